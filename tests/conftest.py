"""What all tests share: a cache of their own, a copy of the clone, and an order that keeps both workers busy."""

from pathlib import Path

import pytest
from shared.clone import copied

pytest_plugins = ["shared.browser"]


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
