"""Questions to a run about noised images: what is shown, what is told, what the answer is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.asked import CLASSES, SIDE, observed, question
from shared.asked import noised as some

from maskalign_lab.gradient_norms import noised_hidden, observe
from maskalign_lab.measure.questions import STAND_INS, ask, fit_class_probe, noised
from maskalign_lab.runs.run import load_run
from maskalign_lab.training.repa import cosine_alignment


@pytest.fixture(scope="module")
def reg():
    return observe(load_run("reg-shapes"))


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_images_are_noised_as_study_01_does_it_class_tokens_too(reg, t):
    held_out, index = reg.run.survey_images(16), np.array([3, 1, 7])
    images = noised(reg, held_out, index, t)
    hidden = noised_hidden(reg.run, reg.depth, held_out, index, images.t, step=3)
    asked = ask("alignment", reg, t)
    known = -cosine_alignment(reg.projector(hidden), images.features).mean(1)
    torch.testing.assert_close(asked.answer(images), known)


def test_a_stand_in_is_the_mean_image_under_the_same_noise_or_none(reg):
    held_out, index = reg.run.survey_images(16), np.arange(3)
    under, bare = (noised(reg, held_out, index, 0.25, name) for name in STAND_INS)
    mean = reg.run.inputs(held_out).mean(0)
    torch.testing.assert_close(bare.stand_in, (0.75 * mean).expand(3, -1, -1, -1))
    noise = under.stand_in - bare.stand_in
    torch.testing.assert_close(under.images, 0.75 * reg.run.inputs(held_out, index) + noise)
    late = noised(reg, held_out, index, 1.0)
    torch.testing.assert_close(late.images, late.stand_in)  # at pure noise there is nothing to remove


def test_the_mean_stand_in_is_the_mean_embedded_token(reg):
    held_out = reg.run.survey_images(16)
    every = noised(reg, held_out, np.arange(16), 0.25, "mean")
    clean = reg.net.x_embedder(0.75 * reg.run.inputs(held_out)).mean(0)
    torch.testing.assert_close(reg.net.x_embedder(every.stand_in)[0], clean, rtol=1e-4, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(label=st.integers(0, CLASSES - 1))
def test_only_the_alignment_question_tells_the_class(label):
    images = some(images=2)
    labels = torch.full_like(images.labels, label)
    for name, told in (("alignment", labels), ("class", torch.full_like(labels, CLASSES))):
        images.labels[:] = label
        assert torch.equal(question(name, observed()).context(images)[1], told)


def test_the_class_logit_is_the_probe_s_of_the_mean_patch():
    of, images = observed(class_dim=6), some(class_dim=6)
    asked, null = question("class", of), torch.full_like(images.labels, CLASSES)
    hidden = of.net.hidden(images.images, images.t, null, of.depth, images.cls)[:, 1:]
    assert hidden.shape[1] == SIDE**2
    torch.testing.assert_close(
        asked.answer(images), asked.probe(hidden.mean(1)).gather(1, images.labels[:, None])[:, 0]
    )


def test_a_probe_reads_the_class_and_its_logits_add_up_to_nothing(reg):
    probe, held_out = fit_class_probe(reg, 0.2, images=512), reg.run.survey_images(256)
    images = noised(reg, held_out, np.arange(256), 0.2)
    hidden = reg.net.hidden(images.images, images.t, torch.full_like(images.labels, 10), reg.depth, images.cls)[:, 1:]
    logits = probe(hidden.mean(1))
    assert (logits.argmax(1) == images.labels).float().mean() > 0.2  # a tenth by chance
    assert logits.sum(1).abs().max() < 1e-2 * logits.abs().max()


def test_unknown_names_and_times_are_refused(reg):
    held_out = reg.run.survey_images(16)
    with pytest.raises(ValueError, match="unknown question 'clas'. Did you mean 'class'"):
        ask("clas", reg, 0.5)
    with pytest.raises(ValueError, match="unknown stand-in 'noize'. Did you mean 'noise'"):
        noised(reg, held_out, np.arange(2), 0.5, "noize")
    with pytest.raises(ValueError, match="outside"):
        noised(reg, held_out, np.arange(2), 500)
