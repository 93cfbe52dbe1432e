"""Means and shares: where there are too few values, and where all of them are alike."""

import pytest
import torch

from maskalign_lab.base.statistics import mean_interval, share_half


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_values_have_no_interval_and_no_warning(n, recwarn):
    _, half = mean_interval(torch.ones(3, n))
    assert half.isnan().all() and not recwarn.list


def test_a_share_of_all_or_none_is_not_certain():
    """The interval is as wide for none as for all, is not 0, and shrinks with n."""
    none, every = (share_half(torch.full((40,), value)) for value in (False, True))
    assert (
        none.item() == pytest.approx(every.item()) and every > 0.05 and share_half(torch.full((400,), True)) < every / 5
    )
