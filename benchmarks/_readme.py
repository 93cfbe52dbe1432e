"""Write the tables of `results/` into the README: `python benchmarks/_readme.py` after `maskalign-lab bench --out`."""

import re
from pathlib import Path

from maskalign_lab.workbench.benchmarking import from_json, summary, table

FOLDER = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- (results/[\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(found: re.Match) -> str:
    """One table, with its machine above it."""
    comparisons, facts = from_json((FOLDER / found[2]).read_text(encoding="utf-8"))
    return f"{found[1]}```text\n{summary(facts)}\n\n{table(comparisons)}\n```\n{found[3]}"


if __name__ == "__main__":
    readme = FOLDER / "README.md"
    readme.write_text(BLOCK.sub(block, readme.read_text(encoding="utf-8")), encoding="utf-8")
