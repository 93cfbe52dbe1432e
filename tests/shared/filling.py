"""What several processes do to one cache.

Here, since a new process finds `shared` by its name; a package `tests` of others may hide ours.
"""

from pathlib import Path

import torch

from maskalign_lab.data.cache_filling import fill
from maskalign_lab.data.caching import open_cache

OURS = {"data": "d1", "teacher": "t1", "grid": 8, "sizes": (4, 4)}
SOURCE = torch.arange(20 * 3, dtype=torch.float32).reshape(20, 3)


class Counted:
    """Rows of a tensor; notes which were asked for, and stops when it was asked often enough."""

    def __init__(self, source=SOURCE, stop_after=None):
        self.source, self.stop_after, self.asked = source, stop_after, []

    def __call__(self, start, stop):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        return self.source[start:stop]


def fill_and_count(folder: str) -> int:
    asked = Counted()
    fill(Path(folder), OURS, 20, asked, 1)
    return len(asked.asked)


def read_and_compare(folder: str, seed: int) -> bool:
    cache = open_cache(Path(folder), OURS)
    draws = [torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(seed + k)) for k in range(50)]
    return all(torch.equal(cache[index], SOURCE[index]) for index in draws)
