"""Attributions of an answer to tokens: what they add up to, what they equal, and that images do not know of each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.asked import SIDE, noised, observed, question

from maskalign_lab.gradient_norms import token_gradient_norms
from maskalign_lab.measure import attribution
from maskalign_lab.measure.attribution import ATTRIBUTIONS, attribute, conductance, integrated_gradients, unfaithful

QUESTIONS = ("alignment", "class")
NETWORKS = [{}, {"class_dim": 6}, {"class_dim": 6, "mixer_depth": 1}]
SEEDS = st.integers(0, 2**31)
PATHS = ("integrated gradients", "conductance, block 1", "conductance, half way", "own change")


def change(asked, images):
    """What the answer gains from the content."""
    return asked.answer(images) - asked.answer(images, images.stand_in)


@pytest.mark.parametrize("more", NETWORKS)
@pytest.mark.parametrize("name", QUESTIONS)
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_integrated_gradients_add_up_to_the_change_of_the_answer(name, more, seed):
    asked, images = question(name, observed(**more)), noised(seed, class_dim=more.get("class_dim"))
    scores = integrated_gradients(asked, images, steps=48)
    torch.testing.assert_close(scores.values.sum(1) - change(asked, images), scores.delta)
    assert (scores.delta.abs() < 1e-3 * change(asked, images).abs().max()).all()


@pytest.mark.parametrize("name", QUESTIONS)
@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_conductance_converges_as_a_trapezoid_rule_does(name, seed):
    asked, images = question(name, observed()), noised(seed)
    coarse, fine = (conductance(asked, images, 1, steps) for steps in (24, 96))
    torch.testing.assert_close(fine.values.sum(1) - change(asked, images), fine.delta)
    assert fine.delta.abs().max() < 0.15 * coarse.delta.abs().max()  # a sixteenth in the limit, a quarter by left sums


@pytest.mark.parametrize("name", QUESTIONS)
def test_conductance_at_the_aligned_depth_is_the_change_of_the_tokens_own_terms(name):
    asked, images = question(name, observed()), noised()
    known = attribution.own_change(asked, images)
    torch.testing.assert_close(known.values.sum(1), change(asked, images))
    walked = conductance(asked, images, asked.observed.depth, steps=400).values
    torch.testing.assert_close(walked, known.values, rtol=1e-3, atol=1e-4 * float(walked.abs().max()))


@pytest.mark.parametrize("more", NETWORKS)
@pytest.mark.parametrize("name", QUESTIONS)
def test_ablation_is_what_a_loop_finds(name, more):
    asked, images = question(name, observed(**more)), noised(class_dim=more.get("class_dim"))
    (scores,) = attribute(["ablation"], asked, images).values()
    for token in range(SIDE**2):
        row, column = (slice(4 * at, 4 * at + 4) for at in divmod(token, SIDE))
        without = images.images.clone()
        without[:, :, row, column] = images.stand_in[:, :, row, column]
        torch.testing.assert_close(scores.values[:, token], asked.answer(images) - asked.answer(images, without))


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(4)), seed=SEEDS, batch_size=st.integers(1, 4))
def test_images_in_another_order_or_other_batches_have_the_same_scores(order, seed, batch_size):
    asked, images = question("alignment", observed()), noised(seed, images=4)
    found, again = (
        attribute(ATTRIBUTIONS, asked, images),
        attribute(ATTRIBUTIONS, asked, images.take(order), batch_size),
    )
    for name in ATTRIBUTIONS:
        torch.testing.assert_close(
            again[name].values, found[name].values[order], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_token_without_content_adds_nothing(name):
    asked, images = question(name, observed()), noised()
    images.images[:, :, :4, 4:8] = images.stand_in[:, :, :4, 4:8]  # token 1
    for each, scores in attribute(("integrated gradients", "ablation"), asked, images).items():
        assert scores.values[:, 1].abs().max() < 1e-12, each
        assert scores.values[:, [0, 2, 3]].abs().min() > 0


def test_where_tokens_do_not_mix_every_path_is_the_token_s_own():
    asked, images = (
        question("class", observed(mixes=False)),
        noised(),
    )  # linear in each token, and the blocks are the identity
    found = attribute((*PATHS, "ablation"), asked, images)
    for name, scores in found.items():
        torch.testing.assert_close(
            scores.values, found["own change"].values, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("class_dim", [None, 6])
def test_the_norm_is_that_of_study_01_whatever_is_asked(class_dim):
    of, images = observed(class_dim=class_dim), noised(class_dim=class_dim)
    hidden = of.net.hidden(images.images, images.t, images.labels, of.depth, images.cls)[:, -(SIDE**2) :]
    known = token_gradient_norms(of.projector, hidden, images.features)
    for name in QUESTIONS:
        (scores,) = attribute(["norm"], question(name, of), images).values()
        torch.testing.assert_close(scores.values, known)


def test_the_input_norm_is_that_of_finite_differences():
    asked, images = question("alignment", observed()), noised(images=2)
    (scores,) = attribute(["input norm"], asked, images).values()
    moves = torch.eye(48, dtype=torch.float64).view(48, 3, 4, 4) * 1e-6
    slopes = []
    for move in moves:  # the pixels of token 6
        near = [images.images.clone() for _ in range(2)]
        near[0][:, :, 4:8, 8:12] += move
        near[1][:, :, 4:8, 8:12] -= move
        slopes.append((asked.answer(images, near[0]) - asked.answer(images, near[1])) / 2e-6)
    torch.testing.assert_close(scores.values[:, 6], torch.stack(slopes).norm(dim=0), rtol=1e-5, atol=0)


def test_an_unknown_name_is_refused_with_the_nearest_before_any_work():
    with pytest.raises(ValueError, match="unknown attribution 'ablaton'. Did you mean 'ablation'"):
        attribute(["ablaton"], None, None)


# ---- infidelity


class Linear:
    """An answer whose tokens add up: known numbers times the mean of each patch."""

    def __init__(self, asked, weights):
        self.observed, self.context, self.weights = asked.observed, asked.context, weights

    def __call__(self, images, *_):
        return (self.weights.repeat(len(images) // len(self.weights), 1) * per_token(images)).sum(1)


def per_token(images):
    return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS, unit=st.floats(0.1, 10))
def test_scores_that_add_up_are_faithful_in_any_unit_and_equal_ones_are_the_measure(seed, unit):
    images = noised(seed)
    weights = torch.randn(1, SIDE**2, generator=torch.Generator().manual_seed(seed)).expand(len(images), -1)
    asked = Linear(question("alignment", observed()), weights[:1])
    exact = weights * (per_token(images.images) - per_token(images.stand_in))
    assert unfaithful(asked, images, unit * exact) < 1e-3
    assert unfaithful(asked, images, torch.full_like(exact, unit)) == pytest.approx(1)
    assert unfaithful(asked, images, exact.flip(1)) > 0.05


@pytest.mark.parametrize("more", NETWORKS)
def test_every_attribution_can_be_asked_for_its_infidelity(more):
    asked, images = question("alignment", observed(**more)), noised(class_dim=more.get("class_dim"))
    for name, scores in attribute(ATTRIBUTIONS, asked, images).items():
        found = unfaithful(asked, images, scores.values, draws=2)
        assert 0 <= found < float("inf") and found == unfaithful(asked, images, scores.values, draws=2), name
