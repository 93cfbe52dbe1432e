"""Rankings beside chance and beside an order that looks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.asked import SIDE, noised, observed, question

from maskalign_lab.measure.attribution import ATTRIBUTIONS
from maskalign_lab.measure.deletion import remove_by
from maskalign_lab.measure.rankings import (
    NORM,
    POSITIONS,
    RANDOM,
    averaged,
    beside,
    greedy,
    least_first,
    of_ceiling,
    of_others,
    random_scores,
    rank,
    remove_all,
)

N = SIDE**2


def alone():
    """A question to a network whose tokens do not mix, so that the answer is a sum over tokens."""
    return question("alignment", observed(mixes=False))


def test_random_beside_itself_has_no_difference():
    asked, images = question("alignment", observed()), noised()
    removed = remove_all(asked, images, rank(asked, images, (NORM,)))
    found = beside(removed, RANDOM)
    assert (found.mean, found.half) == (0, 0) and list(removed) == [NORM, POSITIONS, RANDOM]


def test_random_orders_are_new_for_every_image_and_draw_and_the_same_when_asked_again():
    first, again, other = (random_scores(5, N, draw) for draw in (0, 0, 1))
    assert torch.equal(first, again) and len(torch.cat([first, other]).argsort(1).unique(dim=0)) == 10


@given(values=st.lists(st.lists(st.integers(-9, 9), min_size=3, max_size=3), min_size=2, max_size=6))
def test_the_mean_of_the_others_leaves_out_an_image_itself(values):
    scores = torch.tensor(values).double()
    for image, found in enumerate(of_others(scores)):
        torch.testing.assert_close(found, torch.cat([scores[:image], scores[image + 1 :]]).mean(0))


def test_all_attributions_are_ranked_and_all_rankings_removed():
    asked, images = question("class", observed()), noised()
    removed = remove_all(asked, images, rank(asked, images))
    assert list(removed) == [*ATTRIBUTIONS, POSITIONS, RANDOM]
    chance = [remove_by(asked, images, random_scores(3, N, draw)) for draw in range(2)]
    torch.testing.assert_close(removed[RANDOM].deletion, (chance[0].deletion + chance[1].deletion) / 2)
    assert averaged(chance).levels == removed[RANDOM].levels


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_where_the_answer_is_a_sum_ablation_is_the_best_ranking_and_greedy_finds_it(seed):
    asked, images = alone(), noised(seed)
    removed, ceiling = remove_all(asked, images, rank(asked, images)), greedy(asked, images)
    torch.testing.assert_close(ceiling.deletion, removed["ablation"].deletion)
    torch.testing.assert_close(ceiling.insertion, removed["ablation"].insertion)
    assert all((each.gap <= ceiling.gap + 1e-12).all() for each in removed.values())
    shares = of_ceiling(removed, ceiling)
    assert shares["ablation"] == pytest.approx(1) and max(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("empty", [True, False])
def test_the_order_that_looks_moves_every_token_once_the_least_change_first(empty):
    asked, images = question("class", observed()), noised()
    order = least_first(asked, images, empty)
    assert torch.equal(order.sort(1).values, torch.arange(N).expand(3, -1))
    start = images.stand_in if empty else images.images
    other = images.images if empty else images.stand_in
    changes = []
    for token in range(N):
        row, column = (slice(4 * at, 4 * at + 4) for at in divmod(token, SIDE))
        moved = start.clone()
        moved[:, :, row, column] = other[:, :, row, column]
        changes.append(asked.answer(images, moved))
    best = torch.stack(changes, 1).argsort(1, descending=not empty)[:, :2]  # two tokens move at a time
    assert torch.equal(order[:, :2], best)


def test_the_ceiling_is_compared_on_the_images_that_both_have():
    asked, images = alone(), noised(images=4)
    removed = remove_all(asked, images, rank(asked, images, (NORM,)))
    ceiling = greedy(asked, images.take(slice(0, 2)))
    found = of_ceiling(removed, ceiling)[NORM]
    assert found == pytest.approx(float(removed[NORM].gap[:2].mean() / ceiling.gap.mean()))


def test_an_unknown_ranking_is_refused_with_the_nearest():
    asked, images = alone(), noised()
    removed = remove_all(asked, images, rank(asked, images, (NORM,)))
    with pytest.raises(ValueError, match="unknown ranking 'nrom'. Did you mean 'norm'"):
        beside(removed, "nrom")
