"""What the tests share: where the project is, and copies of it that a test may spoil."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the clone for one test."""
    return copied(tmp_path / "clone")


LONG = ("test_browser", "test_study", "test_survival")  # files that run studies or kill trainings


def pytest_collection_modifyitems(items):
    """Long files go first, so that no worker is left alone with one; `gpu` tests are skipped without a CUDA device."""
    items.sort(key=lambda item: not item.path.name.startswith(LONG))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
