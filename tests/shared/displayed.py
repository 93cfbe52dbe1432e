"""What an executed notebook displays."""

import re
from pathlib import Path

import nbformat


def displayed_markdown(notebook: Path) -> list[str]:
    """The Markdown that code cells display, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = (output for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    return [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]


def section_prose(notebook: Path, title: str) -> str:
    """The Markdown of a study's section, which its own heading begins and the next one ends."""
    cells = nbformat.read(notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (found,) = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return found.strip()
