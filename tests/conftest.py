"""What all tests share: caches and folders of their own, a copy of the clone, and which of them go to one worker, in which order."""

import re
from pathlib import Path

import pytest
from shared.clone import copied

pytest_plugins = ["shared.browser", "shared.studies"]


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_folders(monkeypatch, tmp_path):
    """A cache and a place for results that no other test sees."""
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the clone for one test."""
    return copied(tmp_path / "clone")


LONG = ("study", "test_browser", "test_survival")  # groups that run studies or kill trainings


def group_of(item) -> str:
    """Tests of a group share what they made, so one worker takes them all: those of a study, else those of a file."""
    study = getattr(item, "callspec", None) and item.callspec.params.get("study")
    number = study.number if study else (re.match(r"test_study_(\d\d)", item.path.name) or "  ")[1]
    return f"study {number}" if number.strip() else item.path.stem


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Groups stay together, long ones first, so that no worker is left alone with one; `gpu` tests need a CUDA device."""
    groups = {}
    for item in items:
        groups.setdefault(group_of(item), []).append(item)
    for group, members in groups.items():
        for item in members:
            item.add_marker(pytest.mark.xdist_group(group))
    in_order = sorted(groups, key=lambda group: not group.startswith(LONG))
    items[:] = [item for group in in_order for item in groups[group]]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
