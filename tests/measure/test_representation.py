"""CKNNA and probes over depth, pooling and gradient cosines against obvious versions of themselves."""

import pytest
import torch

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.interpolants import interpolate
from maskalign_lab.diffusion.objectives import Objective, draw_noise
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.measure.representation import cknna_over_depth, gradient_cosine, pooled_hidden, probe_over_depth
from maskalign_lab.training.methods import Batch, Draw, State
from maskalign_lab.training.repa import REPA, REPAConfig


def network(depth=3):
    torch.manual_seed(0)
    net = SiT(input_size=16, patch_size=4, in_channels=3, width=32, depth=depth, heads=4, num_classes=10)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


def test_pooled_hidden_is_the_mean_token_whatever_the_batch_size():
    net, x, y = network(), torch.randn(10, 3, 16, 16), torch.arange(10)
    small, large = (pooled_hidden(net, Objective(), x, y, 0.3, [1, 3], batch_size=size) for size in (3, 256))
    noise = draw_noise(Objective(), x.shape, generator(0, 0, "probing"))
    times = torch.full((10,), 0.3)
    hidden = net(interpolate(x, noise, times), times, y, collect=(1, 3)).hidden
    for depth in (1, 3):
        torch.testing.assert_close(small[depth], large[depth])
        torch.testing.assert_close(large[depth], hidden[depth].mean(1))


def test_a_class_that_can_be_seen_is_found_until_noise_hides_it():
    net, labels = network(), torch.arange(400) % 2
    x = 0.3 * torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(1)) + (2.0 * labels - 1).view(
        -1, 1, 1, 1
    )
    scores = probe_over_depth(net, Objective(), x, labels, [0.1, 1.0], [1, 3])
    assert scores.shape == (2, 2) and scores[0].min() > 0.95 and scores[1].max() < 0.65


def test_tokens_resemble_features_that_are_made_of_them():
    net, x = network(), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    times, null = torch.zeros(64), torch.full((64,), 10)
    features = net(x, times, null, collect=(2,)).hidden[2].detach()
    values = cknna_over_depth(net, Objective(), x, features, [0.0, 1.0], [1, 2, 3], k=5)
    assert values.shape == (2, 3) and values[0, 1] == pytest.approx(1, abs=1e-5) and values[0].argmax() == 1
    assert values[1].max() < 0.5


def test_the_gradient_cosine_is_that_of_two_backward_passes():
    net = network()
    repa = REPA(net, Objective(), REPAConfig(depth=2, projector_width=24), teacher_dims=(12,))
    batch = Batch(torch.randn(6, 3, 16, 16), torch.arange(6), torch.randn(6, 16, 12))
    values = gradient_cosine(repa, net, batch, [0.25, 0.75], [1, 2], seed=3)
    noise = draw_noise(Objective(), batch.x.shape, generator(3, 0, "noise"))
    for i, t in enumerate((0.25, 0.75)):
        for j, depth in enumerate((1, 2)):
            slopes = []
            for name in ("denoising", "alignment"):
                net.zero_grad(set_to_none=True)
                repa.loss(State(net, net, 0), batch, Draw(torch.full((6,), t), noise, batch.y)).parts[name].backward()
                slopes.append(torch.cat([p.grad.flatten() for p in net.blocks[depth - 1].parameters()]))
            assert values[i, j].item() == pytest.approx(torch.cosine_similarity(*slopes, dim=0).item(), abs=1e-5)
