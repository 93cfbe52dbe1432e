"""Small studies, written for a test."""

import nbformat

DECLARED = 'preset: str = "laptop"  # smoke | laptop\nseed: int = 0\nout_dir: str = ""'


def write(path, *sources, tags=("parameters",)):
    """A study: a heading, the parameters, and cells with the given sources."""
    cells = [nbformat.v4.new_markdown_cell("# A study"), *map(nbformat.v4.new_code_cell, (DECLARED, *sources))]
    cells[1].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path
