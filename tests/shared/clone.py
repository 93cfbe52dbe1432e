"""Where the project is, and copies of it that a test may spoil."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("maskalign_lab", "nbs", "data", "tests", "benchmarks")


def copied(target: Path) -> Path:
    """A copy of the clone at `target`, without what running leaves behind."""
    junk = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    target.mkdir()
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, target / path.name, ignore=junk)
        elif path.is_file():
            shutil.copy2(path, target)
    return target
