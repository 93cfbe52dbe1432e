"""A sample is the same whoever draws it: beside which others, into which file, before or after a stop."""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.sampled import PLAIN, plan, random_run

from maskalign_lab.data.cache_filling import Share
from maskalign_lab.diffusion.sampling import SamplerConfig, last_sample
from maskalign_lab.runs import sampling_shards
from maskalign_lab.runs.sample_plan import labels_of
from maskalign_lab.runs.sampling_shards import BLOCK, Drawer, kept_samples, make_samples

NOISY = SamplerConfig("euler-maruyama", 3, 2.0, precision="float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "small")


@pytest.fixture(scope="module")
def whole(run):
    return Drawer(run, plan(sampler=NOISY))(0, 3 * BLOCK)


@settings(max_examples=12, deadline=None)
@given(start=st.integers(0, 3 * BLOCK - 1), n=st.integers(1, BLOCK + 3))
def test_samples_of_any_range_are_those_of_the_whole(run, whole, start, n):
    stop = min(start + n, len(whole))
    assert torch.equal(Drawer(run, plan(sampler=NOISY))(start, stop), whole[start:stop])


@pytest.mark.parametrize("size", [1, 8, 64, 128])
def test_samples_that_are_asked_for_in_portions_of_any_size_are_equal(run, whole, size):
    draw, n = Drawer(run, plan(sampler=NOISY)), min(len(whole), 16 * size)
    parts = [draw(start, min(start + size, n)) for start in range(0, n, size)]
    assert torch.equal(torch.cat(parts), whole[:n])


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_no_other_solver_depends_on_the_portion(run, solver):
    """The adaptive one chooses its steps for a block as a whole."""
    like = plan(sampler=replace(PLAIN, solver=solver))
    assert torch.equal(Drawer(run, like)(64, 66), Drawer(run, like)(62, 66)[2:])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_network_sees_whole_blocks_only(run, guidance):
    seen = []
    handle = run.net.register_forward_pre_hook(lambda net, given: seen.append(len(given[0])))
    Drawer(run, plan(sampler=replace(PLAIN, guidance=guidance)))(62, 66)
    handle.remove()
    assert set(seen) == {BLOCK if guidance == 1 else 2 * BLOCK}


def test_a_block_that_is_asked_for_again_is_not_drawn_again(run, monkeypatch):
    drawn, make = [], sampling_shards.block_samples
    monkeypatch.setattr(sampling_shards, "block_samples", lambda *of: drawn.append(of[-1]) or make(*of))
    draw = Drawer(run, plan())
    for start in range(0, 80, 8):
        draw(start, start + 8)
    assert drawn == [0, 1]


def test_noise_is_a_samples_own_at_every_step(run):
    """Two samples of one class differ, and one beside others is what it is alone, up to the order of sums."""
    y = torch.tensor([3, 3, 3])
    found = last_sample(run.net, run.recipe.objective, y, NOISY, 5, numbers=[0, 1, 200])
    alone = last_sample(run.net, run.recipe.objective, y[:1], NOISY, 5, numbers=[200])
    torch.testing.assert_close(found[2:], alone, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.5
    other = last_sample(run.net, run.recipe.objective, y[:1], NOISY, 6, numbers=[200])
    assert (other - alone).abs().max() > 0.5


def test_a_class_token_has_noise_of_its_own(tmp_path):
    run = random_run(tmp_path / "reg", "reg")
    assert run.net.class_dim
    assert torch.equal(Drawer(run, plan(sampler=NOISY))(70, 72), Drawer(run, plan(sampler=NOISY))(64, 80)[6:8])


# ---- labels


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(1, 12), rounds=st.integers(1, 4), more=st.integers(0, 11), seed=st.integers(0, 9))
def test_balanced_labels_differ_in_number_by_one_at_most(classes, rounds, more, seed):
    counts = labels_of(range(classes * rounds + more % classes), classes, "balanced", seed).bincount(minlength=classes)
    assert counts.min() == rounds and counts.max() <= rounds + 1


@pytest.mark.parametrize("law", ["balanced", "random"])
def test_a_label_depends_on_seed_and_number_alone(law):
    all_labels = labels_of(range(50), 10, law, 3)
    assert torch.equal(labels_of([41, 7], 10, law, 3), all_labels[[41, 7]])
    assert not torch.equal(labels_of(range(50), 10, law, 4), all_labels)


def test_random_labels_are_drawn_one_by_one():
    counts = labels_of(range(2000), 4, "random", 0).bincount(minlength=4)
    assert ((counts - 500).abs() < 100).all() and counts.unique().numel() > 1  # five deviations


# ---- files


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("size", [8, 128])
def test_four_processes_write_what_one_does(run, size, tmp_path):
    asked = plan(150)
    make_samples(run, asked, tmp_path / "one", shard_rows=size, print_every=0)
    for rank in (2, 0, 3, 1):
        make_samples(run, asked, tmp_path / "four", Share(rank, 4), size, print_every=0)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "four")
    rows = kept_samples(run, asked, tmp_path / "four")
    assert torch.equal(rows[:], Drawer(run, asked)(0, 150)) and rows.shard_rows == size


def test_a_stop_loses_no_file_and_the_same_call_goes_on(run, tmp_path, monkeypatch):
    asked, folder = plan(150), tmp_path / "samples"

    def stopped(*of):
        if of[-1] == 1:
            raise SystemExit(75)
        return make(*of)

    make = sampling_shards.block_samples
    monkeypatch.setattr(sampling_shards, "block_samples", stopped)
    with pytest.raises(SystemExit):
        make_samples(run, asked, folder, shard_rows=16, print_every=0)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(before) == 4
    (folder / f".00004.safetensors.{os.getpid()}").write_bytes(b"half")  # what a kill leaves of one
    with pytest.raises(ValueError, match="00004.safetensors is missing"):
        kept_samples(run, asked, folder)
    make_samples(run, asked, folder, shard_rows=99, print_every=0)  # the size of the files stays
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(after) == 10 and before.items() <= after.items() and not list(folder.glob(".*.safetensors.*"))
    assert torch.equal(kept_samples(run, asked, folder)[:], Drawer(run, asked)(0, 150))


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"seed": 1}, "seed"), ({"labels": "random"}, "labels"), ({"sampler": NOISY}, "sampler"), ({"n": 20}, "rows")],
)
def test_other_samples_do_not_go_on_in_a_folder(run, tmp_path, changes, field):
    make_samples(run, plan(8), tmp_path, print_every=0)
    with pytest.raises(ValueError, match=f"was made with {field}"):
        make_samples(run, plan(**{"n": 8} | changes), tmp_path, print_every=0)


def test_samples_of_another_network_of_the_same_name_are_not_taken(run, tmp_path):
    make_samples(run, plan(8), tmp_path / "samples", print_every=0)
    again = random_run(tmp_path / "small", seed=1)
    assert again.name == run.name
    with pytest.raises(ValueError, match="was made with network"):
        kept_samples(again, plan(8), tmp_path / "samples")


def test_samples_that_are_no_numbers_are_not_kept(tmp_path):
    run = random_run(tmp_path / "run")
    run.net.final_layer.linear.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="64 of 64 samples hold numbers that are not finite"):
        make_samples(run, plan(8), tmp_path / "samples", print_every=0)
    assert not list((tmp_path / "samples").glob("*.safetensors"))
