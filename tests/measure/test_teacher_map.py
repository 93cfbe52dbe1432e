"""Linear maps from hidden tokens to a teacher's: least squares against numpy, and teachers whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.encoders.teachers import Features
from maskalign_lab.measure.representation import hidden_over_depth
from maskalign_lab.measure.teacher_map import fit_teacher_maps, least_squares, teacher_cosines


def made(class_dim=None):
    """A network that does something, and images to fit to and to ask about."""
    torch.manual_seed(0)
    net = SiT(16, 4, 3, width=32, depth=3, heads=4, num_classes=10, class_dim=class_dim).eval()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    inputs = lambda dataset, index=slice(None): dataset.images(index)  # noqa: E731
    run = SimpleNamespace(name="made", net=net, inputs=inputs, recipe=SimpleNamespace(objective=Objective()))
    return run, load_dataset("shapes", 16, "train", 60), load_dataset("shapes", 16, "validation", 20)


def said(n, seed=0, dim=5):
    draw = torch.Generator().manual_seed(seed)
    return Features(torch.randn(n, 16, dim, generator=draw), torch.randn(n, dim, generator=draw))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(0, 0.1))
def test_least_squares_are_those_of_the_normal_equations(seed, ridge):
    draw = torch.Generator().manual_seed(seed)
    given, wanted = (torch.randn(2, 40, d, generator=draw, dtype=torch.float64) for d in (4, 3))
    found = least_squares(given.mT @ given, given.mT @ wanted, ridge)
    for k in range(2):
        squares = (given[k].mT @ given[k]).numpy()
        penalty = ridge * np.diag(squares).mean() * np.eye(4)
        expected = np.linalg.solve(squares + penalty, (given[k].mT @ wanted[k]).numpy())
        np.testing.assert_allclose(found[k], expected, atol=1e-9)
        if not ridge:
            best = np.linalg.lstsq(given[k].numpy(), wanted[k].numpy(), rcond=None)[0]
            np.testing.assert_allclose(found[k], best, atol=1e-9)


def test_maps_are_fitted_to_what_differs_between_images():
    """As if the mean of every position had been taken off all tokens first."""
    run, known, _ = made()
    maps = fit_teacher_maps(run, known, said(60), 0.3, [1, 3], ridge=0.0)
    tokens = torch.cat([tokens for _, tokens in hidden_over_depth(run, known, said(60), 0.3, [1, 3])], 1).double()
    wanted = said(60).tokens.double() - said(60).tokens.double().mean(0)
    for k in range(2):
        given = (tokens[k] - tokens[k].mean(0)).flatten(0, 1)
        best = np.linalg.lstsq(given.numpy(), wanted.flatten(0, 1).numpy(), rcond=None)[0]
        np.testing.assert_allclose(maps.weights[k], best, atol=1e-3)
        torch.testing.assert_close(maps.hidden[k], tokens[k].mean(0).float())


@pytest.mark.parametrize("class_dim", [None, 5])
def test_a_linear_teacher_is_read_exactly_at_its_depth(class_dim):
    """What a turn and a shift of block 2 say is read there without a mistake, and less well elsewhere."""
    run, known, asked = made(class_dim)
    turn = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))

    def teacher(dataset, seed):
        cls = said(len(dataset)).cls
        parts = hidden_over_depth(run, dataset, Features(torch.zeros(len(dataset), 16, 5), cls), 0.4, [2], seed)
        return Features(torch.cat([tokens[0] for _, tokens in parts]) @ turn + 3, cls)

    maps = fit_teacher_maps(run, known, teacher(known, 0), 0.4, [1, 2, 3], ridge=1e-9)
    found = teacher_cosines(maps, run, asked, teacher(asked, 1))
    assert found.shape == (3, 20, 16) and found[1].min() > 0.999 and found.mean((1, 2)).argmax() == 1


def test_random_teachers_and_places_tell_nothing():
    run, known, asked = made()
    maps = fit_teacher_maps(run, known, said(60, 1), 0.2, [2])
    assert teacher_cosines(maps, run, asked, said(20, 2)).mean().abs() < 0.1
    shift = 10 * torch.randn(16, 5, generator=torch.Generator().manual_seed(9))
    far = [Features(features.tokens + shift, features.cls) for features in (said(60, 1), said(20, 2))]
    moved = fit_teacher_maps(run, known, far[0], 0.2, [2])
    torch.testing.assert_close(
        teacher_cosines(moved, run, asked, far[1]), teacher_cosines(maps, run, asked, said(20, 2)), atol=1e-3, rtol=0
    )


def test_maps_are_of_a_time_and_keep_their_depths():
    run, known, _ = made()
    maps = fit_teacher_maps(run, known, said(60), 1, (3, 1))
    assert maps.t == 1.0 and maps.depths == (3, 1) and maps.weights.shape == (2, 32, 5)
    assert maps.hidden.shape == (2, 16, 32) and maps.said.shape == (16, 5)
