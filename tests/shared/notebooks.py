"""Small studies, written for a test, and parts of studies."""

import ast

import nbformat

DECLARED = 'preset: str = "laptop"  # smoke | laptop\nseed: int = 0\nout_dir: str = ""'


def write(path, *sources, tags=("parameters",)):
    """A study: a heading, the parameters, and cells with the given sources."""
    cells = [nbformat.v4.new_markdown_cell("# A study"), *map(nbformat.v4.new_code_cell, (DECLARED, *sources))]
    cells[1].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def made(source: str) -> set[str]:
    """The names that a cell gives a meaning."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}


def used(source: str) -> set[str]:
    """The names that a cell reads."""
    nodes = ast.walk(ast.parse(source))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def needed(code: dict[int, str], wanted: set[int]) -> set[int]:
    """The wanted cells, and those that make what they read."""
    kept, names = set(), set()
    for number in sorted(code, reverse=True):
        if number in wanted or made(code[number]) & names:
            kept.add(number)
            names = (names - made(code[number])) | used(code[number])
    return kept
