"""Tokens that are taken away or brought back: where curves begin and end, and what the two ways to remove a token are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.asked import SIDE, noised, observed, question

from maskalign_lab.measure.deletion import answers_along, descending, dropped, first_of, levels_of, remove_by, replaced
from maskalign_lab.measure.questions import STAND_INS

QUESTIONS = ("alignment", "class")
N = SIDE**2
SEEDS = st.integers(0, 2**31)


def scores(seed: int, images: int = 3):
    return torch.rand(images, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", QUESTIONS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_curves_end_where_everything_is_removed_whatever_the_ranking(name, seed):
    asked, images = question(name, observed()), noised()
    found = remove_by(asked, images, scores(seed))
    assert found.levels == (0, 2, 4, 6, 8, 10, 12, 14, 16)
    for curve in (found.deletion, found.insertion):
        torch.testing.assert_close(curve[:, 0], asked.answer(images))
        torch.testing.assert_close(curve[:, -1], asked.answer(images, images.stand_in))


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_a_reversed_ranking_has_the_curves_exchanged_so_chance_has_no_gap(seed):
    asked, images = question("alignment", observed()), noised()
    one, other = (remove_by(asked, images, sign * scores(seed)) for sign in (1, -1))
    torch.testing.assert_close(one.deletion, other.insertion)
    torch.testing.assert_close(one.gap, -other.gap)


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, count=st.integers(0, N))
def test_replaced_tokens_have_the_pixels_of_the_stand_in(seed, count):
    asked, images = question("alignment", observed()), noised()
    gone = first_of(descending(scores(seed)), count)
    mixed = images.images.clone()
    for image, token in gone.nonzero().tolist():
        row, column = (slice(4 * at, 4 * at + 4) for at in divmod(token, SIDE))
        mixed[image, :, row, column] = images.stand_in[image, :, row, column]
    torch.testing.assert_close(replaced(asked, images, gone), asked.answer(images, mixed))


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("more", [{}, {"class_dim": 6, "mixer_depth": 1}])
def test_dropping_compares_the_same_tokens_image_by_image(name, more):
    asked, images = question(name, observed(**more)), noised(class_dim=more.get("class_dim"))
    gone = first_of(descending(scores(0)), 5)
    found = dropped(asked, images, gone)
    for image in range(3):
        alone, keep = images.take(slice(image, image + 1)), (~gone[image]).nonzero()[:, 0]
        whole = asked.tokens(alone.images, *asked.context(alone))[0]
        left = asked.tokens(alone.images, *asked.context(alone), keep[None])[0]
        torch.testing.assert_close(found[image], whole.mean() + (left - whole[keep]).mean())


def test_where_tokens_do_not_mix_dropping_others_costs_nothing():
    asked, images = question("alignment", observed(mixes=False, method="maskalign")), noised()
    found = remove_by(asked, images, scores(0), "drop")
    assert found.levels[-1] == 14  # the last tokens stay: without any there is no answer
    torch.testing.assert_close(found.deletion, asked.answer(images)[:, None].expand_as(found.deletion))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, slope=st.floats(-3, 3), start=st.floats(-3, 3))
def test_the_area_is_the_mean_of_a_line(seed, slope, start):
    found = remove_by(question("alignment", observed()), noised(), scores(seed))
    line = start + slope * torch.tensor(found.levels, dtype=torch.float64)[None] / N
    assert float(found.area(line)) == pytest.approx(start + slope / 2, abs=1e-9)


@given(tokens=st.integers(1, 400))
def test_levels_rise_from_none_to_all(tokens):
    levels = levels_of(tokens)
    assert levels[0] == 0 and levels[-1] == tokens and levels == sorted(set(levels)) and len(levels) <= 9


def test_scores_that_are_equal_keep_the_order_of_the_grid():
    assert descending(torch.tensor([[1.0, 2, 2, 1]])).tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize("method", ["repa", "mask-loss"])  # a control with a mask, whose network sees the whole grid
def test_dropping_is_refused_for_networks_that_know_whole_grids_only(method):
    asked = question("alignment", observed(method=method))
    with pytest.raises(ValueError, match="'small' was not trained with masks"):
        remove_by(asked, noised(), scores(0), "drop")


def test_an_unknown_removal_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown removal 'dorp'. Did you mean 'drop'"):
        answers_along(question("alignment", observed()), noised(), descending(scores(0)), [0, 16], "dorp")
    assert STAND_INS == ("noise", "mean")
