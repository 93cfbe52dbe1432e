"""Batches by parts are the whole batch whoever reads them: a thread, several processes, workers that decode."""

import json
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields, replace
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from shared import survive
from torch import Tensor

from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.base.seeding import generator
from maskalign_lab.data.gathering import collect, decode
from maskalign_lab.runs.batches import load_sources, make_batches
from maskalign_lab.runs.presets import LATENTS, NAMED, make_recipe
from maskalign_lab.runs.run import build
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.log import with_log
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import METHODS, Batch, shard
from maskalign_lab.training.prefetch import Portion, Prefetcher, feeding, portions, residents

CPU = torch.device("cpu")
AHEAD, INLINE = ExecutionConfig(placement="host", workers=0), ExecutionConfig(workers=0)
FEW = "data.n=24 training.batch_size=6 training.steps=6"
OURS = {name for name, method in METHODS.items() if method.__module__.startswith("maskalign_lab")}
CASES = [(name, "") for name in sorted({*OURS, *NAMED})]
CASES += [("ahpa", "method.router=bilevel"), ("haste", LATENTS[""]), ("sit", LATENTS[""])]
CASES += [("repa", "data.teacher=tiny,oracle"), ("maskalign", "method.inner.name=haste")]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def recipe_of(name, more=""):
    return make_recipe(name, "smoke", overrides=f"{more} {FEW}")


def tensors(values) -> dict[str, Tensor]:
    """Tensors of a batch or a draw by name, those of held-out images too."""
    present = {f.name: getattr(values, f.name) for f in fields(values)}
    nested = {f"{name} {k}": v for name, b in present.items() if isinstance(b, Batch) for k, v in tensors(b).items()}
    return {name: v for name, v in present.items() if isinstance(v, Tensor)} | nested


def check_equal(ours, theirs, but=()):
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name in but:  # a network that sees fewer images at once may round otherwise
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name


@pytest.fixture
def readers():
    """The threads that read ahead now."""
    return lambda: [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


# ---- parts


@pytest.mark.parametrize(("name", "more"), CASES)
def test_parts_are_the_whole_and_draw_as_the_whole(name, more):
    """Exactly, for every method: what a part holds, and what is drawn knowing a part and the outline alone."""
    batches = make_batches(recipe_of(name, more))
    method = build(recipe_of(name, more), batches.facts)[1]
    for step in (0, 3):
        whole = batches(step)
        draw = method.draw(whole, step, partial(generator, 0))
        for part in range(3):
            with feeding(batches, CPU, INLINE, lambda: iter(())) as feed:
                mine, outline = feed(Portion(step, part, 3))
            check_equal(mine, shard(whole, part, 3), but=("attention",))
            check_equal(method.draw(outline, step, partial(generator, 0)), draw)
            assert {k: v.shape for k, v in tensors(outline).items()} == {k: v.shape for k, v in tensors(whole).items()}


def test_a_part_reads_its_own_rows_and_nothing_else():
    batches = make_batches(recipe_of("ahpa", "method.router=bilevel"))
    whole = batches.places(Portion(4))
    for part in range(2):
        for name, (kind, index) in batches.places(Portion(4, part, 2)).items():
            assert np.array_equal(index, whole[name][1][part::2] if kind != "labels" else whole[name][1]), name


def test_a_draw_that_looks_at_values_of_a_part_is_told_so():
    batches = make_batches(recipe_of("reg"))
    with feeding(batches, CPU, INLINE, lambda: iter(())) as feed:
        whole, outline = feed(Portion(0))[1], feed(Portion(0, 1, 2))[1]
    assert whole.x.isfinite().all() and outline.x.isnan().all() and torch.equal(outline.y, whole.y)


# ---- ahead


class Noted:
    """Squares, and a note of who read which."""

    def __init__(self, bad=None):
        self.rows, self.bad, self.read = {"squares": torch.arange(100.0) ** 2}, bad, []

    def places(self, portion):
        self.read.append((portion.step, threading.current_thread().name.split("_")[0]))
        if portion.step == self.bad:
            raise OSError("the disk is gone")
        return {"x": ("squares", np.arange(portion.part, 4, portion.parts) + portion.step)}

    def assemble(self, read, portion):
        return Batch(read["x"], read["x"]), None


@pytest.mark.parametrize("execution", [AHEAD, INLINE, ExecutionConfig(placement="device")])
def test_everything_is_read_once_in_its_turn_and_nothing_beyond_the_end(execution, readers):
    noted, todo = Noted(), partial(portions, 3, 9, 0, 1)
    with feeding(noted, CPU, execution, todo) as feed:
        found = [feed(portion)[0].x.tolist() for portion in todo()]
        assert feed.waited > 0 and bool(readers()) is (execution is AHEAD)
    assert found == [[float(k) ** 2 for k in range(step, step + 4)] for step in range(3, 9)]
    assert [step for step, _ in noted.read] == list(range(3, 9))
    assert {who for _, who in noted.read} == {"prefetch" if execution is AHEAD else "MainThread"}
    assert not readers()


def test_parts_of_a_part_are_read_ahead_too():
    todo = list(portions(0, 2, rank=1, world=2, micro=2))
    assert todo == [Portion(0, 1, 4), Portion(0, 3, 4), Portion(1, 1, 4), Portion(1, 3, 4)]
    noted = Noted()
    with feeding(noted, CPU, AHEAD, lambda: iter(todo)) as feed:
        assert [feed(portion)[0].x.tolist() for portion in todo] == [[1.0], [9.0], [4.0], [16.0]]
    assert {who for _, who in noted.read} == {"prefetch"}


def test_what_is_asked_for_again_is_read_on_the_spot():
    noted = Noted()
    with feeding(noted, CPU, AHEAD, partial(portions, 0, 5, 0, 1)) as feed:
        found = [feed(Portion(step))[0].x[0].item() for step in (0, 1, 0, 2, 3)]
    assert found == [0, 1, 0, 4, 9] and (0, "MainThread") in noted.read


def test_an_error_of_the_thread_is_raised_where_its_rows_are_wanted(readers):
    with pytest.raises(OSError, match="the disk is gone"):
        with feeding(Noted(bad=3), CPU, AHEAD, partial(portions, 0, 5, 0, 1)) as feed:
            for step in range(5):
                feed(Portion(step))
    assert step == 3 and not readers()


@pytest.mark.parametrize("end", ["whole", "closed", "error"])
def test_no_thread_outlives_a_training(end, readers):
    recipe = recipe_of("repa")
    batches = make_batches(recipe)
    steps = fit(*build(recipe, batches.facts), batches, recipe.training, None, "cpu", AHEAD)
    next(steps)
    assert len(readers()) == 1
    if end == "whole":
        assert sum(1 for _ in steps) == 5
    elif end == "closed":
        steps.close()
    else:
        with pytest.raises(RuntimeError, match="of the caller"):
            steps.throw(RuntimeError("of the caller"))
    assert not readers()


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize("name", ["maskalign", "haste", "ahpa"])
def test_where_rows_live_and_who_reads_them_changes_no_bit(name, placement):
    recipe = recipe_of(name)
    batches, trained = make_batches(recipe), []
    for execution in (ExecutionConfig(), ExecutionConfig(placement=placement)):
        net, method = build(recipe, batches.facts)
        *_, last = fit(net, method, batches, recipe.training, None, "cpu", execution)
        trained.append([last.losses, net.state_dict()])
    for ours, theirs in zip(*trained):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# ---- on the device


def test_what_does_not_fit_is_said_with_its_size():
    rows = {"latents": np.empty((1000, 16), np.uint8), "features 0": torch.empty(1000, 64)}
    assert residents(rows, "auto", 16_000) == ["latents"] and residents(rows, "auto", 272_000) == list(rows)
    with pytest.raises(ValueError, match="latents 16 kB, features 0 256 kB do not fit in the 200 kB"):
        residents(rows, "device", 200_000)


def test_rows_on_the_device_are_picked_there(monkeypatch):
    monkeypatch.setattr("maskalign_lab.data.gathering.BUFFER", 64)
    noted = Noted()
    prefetcher = Prefetcher(noted, CPU, ExecutionConfig(placement="device"), lambda: iter(()))
    assert torch.equal(prefetcher.resident["squares"], noted.rows["squares"])
    noted.rows["squares"].zero_()
    assert prefetcher(Portion(2))[0].x.tolist() == [4, 9, 16, 25]


def test_rows_move_once_it_is_known_what_a_step_takes():
    """On a GPU after three steps, of however many parts; here it is told to."""
    todo = list(portions(5, 12, 0, 1, micro=2))
    prefetcher, lives = Prefetcher(Noted(), CPU, INLINE, lambda: iter(todo)), []
    assert prefetcher.moves is False
    prefetcher.moves = True
    for portion in todo:
        expected = [float(k + portion.step) ** 2 for k in range(portion.part, 4, 2)]
        assert prefetcher(portion)[0].x.tolist() == expected
        lives.append(bool(prefetcher.resident))
    assert lives == [False] * 6 + [True] * 8


# ---- pictures that are decoded


class Files:
    """Pictures on disk, so to speak."""

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, pixels.shape

    def __getitem__(self, index):
        assert isinstance(index, np.ndarray)
        return self.pixels[index]


@pytest.mark.parametrize(("name", "workers"), [("jit", 2), ("jit", 0), ("haste", 1)])
def test_pictures_that_workers_decode_train_to_the_same_bits(name, workers):
    recipe = recipe_of(name, LATENTS[""] if name == "haste" else "")
    sources = load_sources(recipe)
    memory, disk = (make_batches(recipe, sources=sources) for _ in range(2))
    disk.dataset = replace(disk.dataset, pixels=Files(disk.dataset.pixels))
    nets, others = [], set(psutil.Process().children())
    for batches in (memory, disk):
        net, method = build(recipe, sources.facts)
        for _ in fit(net, method, batches, recipe.training, None, "cpu", ExecutionConfig(workers=workers)):
            pass
        nets.append(net.state_dict())
    assert all(torch.equal(value, nets[1][key]) for key, value in nets[0].items())
    assert set(psutil.Process().children()) <= others  # its workers are gone


def test_workers_begin_where_a_training_goes_on():
    recipe = recipe_of("jit")
    batches = make_batches(recipe)
    batches.dataset = replace(batches.dataset, pixels=Files(batches.dataset.pixels))
    todo = partial(portions, 4, 6, 1, 2)
    with feeding(batches, CPU, ExecutionConfig(workers=1, placement="host"), todo) as feed:
        for portion in todo():
            check_equal(feed(portion)[0], batches(*portion))


def test_a_worker_obeys_its_parent_alone():
    """Slurm and Ctrl-C signal every process; the pictures of the last steps are still wanted then."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 2, 2, 3), dtype=np.uint8)
    others = set(psutil.Process().children())  # of tests before
    decoded = decode(Files(pixels), [np.arange(64)] * 40, workers=1)
    (worker,) = set(psutil.Process().children()) - others
    assert np.array_equal(collect(decoded, pixels.shape), pixels)
    kill = "import os, sys; [os.kill(int(sys.argv[1]), int(n)) for n in sys.argv[2:]]"
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    subprocess.run([sys.executable, "-c", kill, str(worker.pid), *(str(int(s)) for s in signals)], check=True)
    for _ in range(30):  # more than are waiting
        assert np.array_equal(collect(decoded, pixels.shape), pixels)
    worker.terminate()
    assert worker.wait(timeout=30) == 0


# ---- processes, and the log


def test_two_processes_that_read_their_own_rows_train_what_one_does(forks, tmp_path):
    """Equal within 1e-5, since sums over two halves are rounded otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"ROWS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [forks.start("survive", tmp_path / "two", 12, **world, **each) for each in ranks]
    survive.train(tmp_path / "one", batches=survive.Rows())
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for part in ("model", "ema"):
        one, two = (load_tensors(step_folder(tmp_path / name), part) for name in ("one", "two"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batches", [survive.batches, survive.Rows()])
def test_the_share_of_waiting_is_logged(batches, tmp_path, capsys):
    steps = fit(*survive.tiny(), batches, survive.config(), None, "cpu")
    for _ in with_log(steps, tmp_path, log_every=4):
        pass
    told = [json.loads(line)["data_wait"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(told) == 3 and all(0 < share < 1 for share in told)
    assert ("waiting for data" in capsys.readouterr().out) is (told[-1] > 0.05)
