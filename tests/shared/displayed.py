"""What an executed notebook displays."""

from pathlib import Path

import nbformat


def displayed_markdown(notebook: Path) -> list[str]:
    """The Markdown that code cells display, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = (output for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    return [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
