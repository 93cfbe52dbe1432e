"""What all tests share: caches and folders of their own, a copy of the clone, and which of them go to one worker, in which order."""

from pathlib import Path

import pytest
from shared.clone import copied
from shared.groups import LONG, group_of

pytest_plugins = ["shared.browser", "shared.forks", "shared.studies", "shared.tracing"]


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile`, a worker takes a group."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    """Groups stay together, long ones first, so that no worker is left alone with one; `gpu` tests need a CUDA device."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(group_of(item.nodeid), []).append(item)
    in_order = sorted(groups, key=lambda group: not group.startswith(LONG))
    items[:] = [item for group in in_order for item in groups[group]]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
