"""Caches: what was stored comes back, filling goes on where it stopped, and what is damaged or foreign is named."""

import contextlib
import json
import signal
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.filling import OURS, SOURCE, Counted, fill_and_count, read_and_compare
from torch.nn.modules.module import register_module_forward_pre_hook

from maskalign_lab.base import paths
from maskalign_lab.base.checkpoints import load_tensors, step_folder
from maskalign_lab.data import cache_filling
from maskalign_lab.data.cache_filling import fill
from maskalign_lab.data.caching import open_cache, place
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.encoders import teacher_features, teachers
from maskalign_lab.encoders.teacher_features import cached_features, dataset_features, rows_of
from maskalign_lab.encoders.teachers import load_teacher
from maskalign_lab.runs import batches
from maskalign_lab.runs.batches import make_batches
from maskalign_lab.runs.preparing import prepare
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train

pytestmark = pytest.mark.usefixtures("own_folders")
TINY = (
    "network.width=16 network.depth=2 network.heads=2 data.n=64 method.depth=1 method.projector_width=16 "
    "training.batch_size=8 training.warmup=2 training.steps=3 training.precision=float32"
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".lock")}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    """One bit of the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ---- what was stored comes back


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_rows_come_back_by_any_index(tmp_path_factory, data):
    n = data.draw(st.integers(1, 30))
    shape = data.draw(st.lists(st.integers(1, 4), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8]))
    source = torch.randint(0, 200, (n, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    shard_rows = data.draw(st.integers(1, 40))
    cache = fill(tmp_path_factory.mktemp("cache") / "a", OURS, n, Counted(source), shard_rows)
    assert (len(cache), cache.shape, cache.dtype) == (n, source.shape, dtype)
    assert torch.equal(cache[:], source)
    indices = torch.tensor(data.draw(st.lists(st.integers(-n, n - 1), max_size=50)), dtype=torch.int64)
    for index in (indices, indices.numpy(), indices.reshape(1, -1), torch.arange(n) % 2 == 0, slice(1, None, 2), n - 1):
        assert torch.equal(cache[index], source[index]), index
    with pytest.raises(IndexError):
        cache[[n]]
    buffer, places = torch.zeros(len(indices), *shape, dtype=dtype), indices % n
    assert cache.read(places, buffer) is buffer and torch.equal(buffer, source[places])


def test_what_is_read_is_a_copy(tmp_path):
    cache = fill(tmp_path / "a", OURS, 20, Counted(), 6)
    cache[:].zero_()
    cache[3].zero_()
    assert torch.equal(open_cache(tmp_path / "a", OURS)[:], SOURCE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_are_mapped_and_not_loaded(tmp_path):
    """64 MB in four shards: memory of the process's own grows by the rows that were asked for, about a seventh."""

    def own_memory() -> int:
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    folder = fill(tmp_path / "a", {}, 128, lambda a, b: torch.ones(b - a, 2**17), 32).folder
    before = own_memory()
    cache = open_cache(folder, {})
    rows = cache[torch.arange(0, 128, 7)]
    assert rows.sum() == rows.numel() and own_memory() - before < 2**25
    assert Path("/proc/self/maps").read_text().count(str(folder)) >= 4


# ---- filling goes on where it stopped


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_an_interrupted_filling_goes_on(tmp_path, stop):
    whole = fill(tmp_path / "whole", OURS, 20, Counted(), 6).folder
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "broken", OURS, 20, Counted(stop_after=stop), 6)
    rest = Counted()
    fill(tmp_path / "broken", OURS, 20, rest, 6)
    assert rest.asked == [(0, 6), (6, 12), (12, 18), (18, 20)][stop:]
    assert contents(tmp_path / "broken") == contents(whole) and len(contents(whole)) == 6


def test_a_complete_cache_is_not_computed_again_and_may_be_read_only(tmp_path):
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    (folder / ".lock").unlink(missing_ok=True)
    again = Counted()
    fill(folder, OURS, 20, again, 5)  # other shards are no other content
    assert again.asked == [] and not (folder / ".lock").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from maskalign_lab.data import cache_filling, cache_index

left = [int(sys.argv[2])]

def or_die(action):
    def attempt(*given):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return action(*given)
    return attempt

os.replace = or_die(os.replace)
cache_filling.add_line = or_die(cache_index.add_line)
rows = torch.arange(60.0).reshape(20, 3)
cache_filling.fill(Path(sys.argv[1]), {"data": "d1"}, 20, lambda a, b: rows[a:b], 6)
"""


@pytest.mark.parametrize(("steps", "made"), [(0, 0), (1, 0), (2, 0), (3, 1), (6, 2)])
def test_a_killed_filling_goes_on(forks, tmp_path, steps, made):
    """Killed before the index, a shard, its line, and later; where a file was to be renamed, the temporary one is there."""
    whole = fill(tmp_path / "whole", {"data": "d1"}, 20, Counted(), 6).folder
    assert forks.start(KILLED, tmp_path / "broken", steps).wait(60) == -signal.SIGKILL
    assert any(path.name.count(".") == 3 for path in (tmp_path / "broken").iterdir()) == (steps in (0, 1, 3))
    rest = Counted()
    fill(tmp_path / "broken", {"data": "d1"}, 20, rest, 6)
    assert len(rest.asked) == 4 - made
    assert contents(tmp_path / "broken") == contents(whole)


@pytest.mark.parametrize("cut_bytes", [1, 20])
def test_half_a_line_of_the_index_is_not_counted(tmp_path, cut_bytes):
    """As a process leaves it that is killed while it writes."""
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    before = contents(folder)
    lines = folder / "shards.0.jsonl"
    lines.write_bytes(lines.read_bytes()[:-cut_bytes])
    with pytest.raises(ValueError, match="00003.safetensors is missing"):
        open_cache(folder, OURS)
    rest = Counted()
    fill(folder, OURS, 20, rest, 6)
    assert rest.asked == [(18, 20)] and contents(folder) == before


def test_a_cache_of_one_index_file_is_read_and_gone_on_with(tmp_path):
    """As they were written before every writer had lines of its own."""
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    head, lines = json.loads((folder / "index.json").read_text()), (folder / "shards.0.jsonl").read_text().splitlines()
    head |= {"shape": [3], "dtype": "float32", "shards": {}}
    for entry in map(json.loads, lines[:3]):
        head["shards"][entry["name"]] = {name: entry[name] for name in ("bytes", "blake2b")}
    (folder / "index.json").write_text(json.dumps(head))
    (folder / "shards.0.jsonl").unlink()
    rest = Counted()
    assert torch.equal(fill(folder, OURS, 20, rest, 6)[:], SOURCE) and rest.asked == [(18, 20)]
    assert torch.equal(open_cache(folder, OURS, hashing=True)[:], SOURCE)


def test_processes_that_fill_and_read_at_once(tmp_path):
    """One computes while the other waits; then both read."""
    folder = str(tmp_path / "a")
    with get_context("spawn").Pool(2) as pool:
        assert sum(pool.map(fill_and_count, [folder] * 2, chunksize=1)) == 20
        assert pool.starmap(read_and_compare, [(folder, 0), (folder, 1000)], chunksize=1) == [True, True]


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_file_that_could_not_be_written_whole_is_not_taken(tmp_path):
    """The system refuses the bytes beyond a limit, as on a full disk."""
    import resource

    source, before = torch.ones(20, 10_000), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(OSError, match="/a cannot be written: .*MASKALIGN_LAB_CACHE"):
            fill(tmp_path / "a", {}, 20, Counted(source), 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(contents(tmp_path / "a")) == {"index.json"}
    assert torch.equal(fill(tmp_path / "a", {}, 20, Counted(source), 6)[:], source)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a cannot be written.*MASKALIGN_LAB_CACHE"):
        fill(tmp_path / "file" / "a", OURS, 20, Counted(), 6)


def test_rows_that_do_not_fit_are_not_stored(tmp_path):
    with pytest.raises(ValueError, match="rows 0 to 6: expected 6 rows, got 5"):
        fill(tmp_path / "a", OURS, 20, lambda a, b: SOURCE[a : b - 1], 6)
    with pytest.raises(ValueError, match=r"rows 6 to 12 are float32 \[2\], those before float32 \[3\]"):
        fill(tmp_path / "a", OURS, 20, lambda a, b: SOURCE[a:b, a and 1 :], 6)
    with pytest.raises(ValueError, match="00001.safetensors is missing .3 of 4 shards"):
        open_cache(tmp_path / "a", OURS)
    with pytest.raises(ValueError, match="at least one"):
        fill(tmp_path / "b", OURS, 0, Counted(), 6)


def test_a_long_filling_tells_how_far_it_is(tmp_path, capsys):
    fill(tmp_path / "a", OURS, 20, Counted(), 6, print_every=1e-9)
    assert "rows: 18 of 20" in capsys.readouterr().out
    fill(tmp_path / "b", OURS, 20, Counted(), 6, print_every=0)
    assert capsys.readouterr().out == ""


# ---- what is damaged or foreign is named


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("unfinished", [False, True])
def test_a_damaged_shard_is_named_and_made_again_once_it_is_removed(tmp_path, damage, unfinished):
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    before = contents(folder)
    if unfinished:
        (folder / "00003.safetensors").unlink()
    damage(folder / "00001.safetensors")
    commands = [lambda: open_cache(folder, OURS, hashing=True)]  # reads all bytes
    if damage is cut:  # sizes are looked at by everyone
        commands += [lambda: fill(folder, OURS, 20, Counted(stop_after=0), 6), lambda: open_cache(folder, OURS)]
    for command in commands:
        with pytest.raises(ValueError, match="00003.*missing|00001.safetensors.*Remove this file"):
            command()
    if not unfinished:
        with pytest.raises(ValueError, match="00001.safetensors.*Remove this file"):
            open_cache(folder, OURS, hashing=True)
    (folder / "00001.safetensors").unlink()
    rest = Counted()
    fill(folder, OURS, 20, rest, 6)
    assert rest.asked == [(6, 12), (18, 20)][: 1 + unfinished] and contents(folder) == before


@settings(deadline=None, max_examples=20)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 3))
def test_any_flipped_bit_is_found(tmp_path_factory, where, bit, shard):
    folder = fill(tmp_path_factory.mktemp("cache") / "a", OURS, 20, Counted(), 6).folder
    path = folder / f"{shard:05d}.safetensors"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard:05d}.safetensors no longer holds"):
        open_cache(folder, OURS, hashing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "t2"}, "made with teacher 't1', wanted is teacher 't2'"),
        ({"grid": 16}, "made with grid 8, wanted is grid 16"),
        ({"noise": 0.1}, "made with noise None, wanted is noise 0.1"),
    ],
)
def test_rows_of_another_description_are_refused(tmp_path, change, message):
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    for finished in (True, False):
        with pytest.raises(ValueError, match=message):
            fill(folder, OURS | change, 20, Counted(stop_after=0), 6)
        if finished:
            (folder / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match="rows 20, wanted is rows 21"):
        fill(folder, OURS, 21, Counted(stop_after=0), 6)
    assert place("features", OURS) != place("features", OURS | change)


def test_a_damaged_index_is_named(tmp_path):
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    text = (folder / "index.json").read_text()
    for wrong in (text[:-20], text.replace('"rows"', '"rowz"'), text.replace('"shard_rows": 6', '"shard_rows": 5')):
        assert wrong != text
        (folder / "index.json").write_text(wrong)
        with pytest.raises(ValueError, match="index.json|damaged"):
            open_cache(folder, OURS)
    with pytest.raises(FileNotFoundError, match="no cache in"):
        open_cache(tmp_path / "none", OURS)


# ---- features


@pytest.fixture
def looks():
    """How many pictures a teacher has looked at."""
    seen = []
    hook = register_module_forward_pre_hook(
        lambda module, given: seen.append(len(given[0])) if isinstance(module, teachers.Teacher) else None
    )
    yield seen
    hook.remove()


def recipe(more=""):
    return make_recipe("repa", "smoke", overrides=f"{TINY} {more}")


def feature_folders() -> list[Path]:
    return sorted((paths.cache() / "features").iterdir())


def test_kept_features_are_the_teachers(monkeypatch, looks):
    """In several shards, with batches cut at the same places."""
    monkeypatch.setattr(cache_filling, "SMALL_SHARD", 1)
    dataset, teacher = load_dataset("shapes", n=300), load_teacher("tiny", grid=8)
    cache = cached_features(teacher, dataset)
    assert len(list(cache.folder.glob("*.safetensors"))) == 2
    assert torch.equal(cache[:], rows_of(dataset_features("tiny", dataset, 8))) and sum(looks) == 600


def test_the_second_training_reads_what_the_first_has_written(tmp_path, looks, monkeypatch):
    loaded = []
    load = teachers.load_tiny
    monkeypatch.setattr(teachers, "load_tiny", lambda *given: loaded.append(given) or load(*given))
    train(recipe(), tmp_path / "first", "cpu", 0)
    assert sum(looks) == 64 and len(loaded) == 1
    train(recipe("training.seed=1"), tmp_path / "second", "cpu", 0)
    assert sum(looks) == 64 and len(loaded) == 2 and len(feature_folders()) == 1


def test_training_with_kept_features_is_the_same_to_the_bit(tmp_path, monkeypatch):
    for name in ("made", "read"):
        train(recipe(), tmp_path / name, "cpu", 0)
    rows = teacher_features.encode(load_teacher("tiny", grid=8), load_dataset("shapes", n=64))
    monkeypatch.setattr(batches, "caches_of", lambda recipe, sources: ([rows], sources.dataset))
    train(recipe(), tmp_path / "memory", "cpu", 0)
    for part in ("model", "ema", "method", "optimizer"):
        made, read, memory = (load_tensors(step_folder(tmp_path / n), part) for n in ("made", "read", "memory"))
        for key in memory:
            assert torch.equal(made[key], memory[key]) and torch.equal(read[key], memory[key]), key


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_shard_is_named_before_training(tmp_path, damage):
    train(recipe(), tmp_path / "first", "cpu", 0)
    damage(shard := feature_folders()[0] / "00000.safetensors")
    with pytest.raises(ValueError, match="00000.safetensors.*Remove this file"):
        prepare(recipe(), "cpu", verify=True)
    if damage is cut:  # a flipped bit is looked for on request only
        with pytest.raises(ValueError, match="00000.safetensors.*Remove this file"):
            train(recipe(), tmp_path / "second", "cpu", 0)
    assert not (tmp_path / "second").exists()
    shard.unlink()
    train(recipe(), tmp_path / "second", "cpu", 0)


def test_features_of_another_teacher_are_refused_before_training(tmp_path):
    """Two teachers have two folders; a folder under the wrong name is refused, and names both teachers."""
    make_batches(recipe())
    (ours,) = feature_folders()
    make_batches(recipe("data.teacher=timm:vit_tiny_patch16_224?random"))
    (theirs,) = set(feature_folders()) - {ours}
    digests = [json.loads((folder / "index.json").read_text())["description"]["teacher"] for folder in (ours, theirs)]
    assert len(set(digests)) == 2
    ours.rename(ours.with_name("aside"))
    theirs.rename(ours)
    with pytest.raises(ValueError, match=f"made with teacher '{digests[1]}', wanted is teacher '{digests[0]}'"):
        train(recipe(), tmp_path / "run", "cpu", 0)
    assert not (tmp_path / "run").exists()


def test_other_data_another_grid_and_other_code_have_folders_of_their_own(monkeypatch):
    random = "timm:vit_tiny_patch16_224?random"
    dataset = load_dataset("shapes", n=4)
    cached_features(load_teacher(random, grid=2), dataset)
    cached_features(load_teacher(random, grid=4), dataset)
    cached_features(load_teacher(random, grid=2), load_dataset("shapes", n=5))
    assert len(feature_folders()) == 3
    for module in (teachers, teacher_features):
        monkeypatch.setattr(module, "prepare", lambda images, mean, std, side: torch.zeros(len(images), 3, side, side))
    cached_features(load_teacher(random, grid=2), dataset)
    assert len(feature_folders()) == 4


def test_the_oracle_is_not_kept():
    (features,) = make_batches(recipe("data.teacher=oracle")).features
    assert torch.equal(features, rows_of(dataset_features("oracle", load_dataset("shapes", n=64), 8)))
    assert not (paths.cache() / "features").exists()


def test_nobody_waits_for_ever_for_a_process_that_is_gone(tmp_path, monkeypatch):
    folder = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder
    cache_filling.wait_for([folder], cache_filling.Share(0, 2))  # all is there
    (folder / "00001.safetensors").unlink()
    monkeypatch.setattr(cache_filling, "PATIENCE", 0.0)
    with pytest.raises(TimeoutError, match="lacks shards of other processes"):
        cache_filling.wait_for([folder], cache_filling.Share(0, 2))


def test_who_waits_is_patient_with_one_that_still_writes(tmp_path, monkeypatch):
    """However long a shard takes: here the other one ends when it has been asked for a second time."""
    folder, asked = fill(tmp_path / "a", OURS, 20, Counted(), 6).folder, []
    (folder / "00001.safetensors").unlink()
    other = contextlib.ExitStack()
    other.enter_context(cache_filling.cache_lock(folder, cache_filling.Share(1, 2)))
    written = cache_filling.is_written

    def ask(where):
        asked.append(written(where))
        if len(asked) == 2:
            other.close()
        return asked[-1]

    monkeypatch.setattr(cache_filling, "PATIENCE", 0.0)
    monkeypatch.setattr(cache_filling, "is_written", ask)
    with pytest.raises(TimeoutError, match="nobody writes there"):
        cache_filling.wait_for([folder], cache_filling.Share(0, 2))
    assert asked == [True, True, False]


@pytest.mark.parametrize(("first", "second"), [((1, 2), (0, 1)), ((0, 1), (1, 2)), ((0, 2), (0, 1))])
def test_a_process_alone_and_one_with_a_share_wait_for_each_other(tmp_path, monkeypatch, first, second):
    """What the first has half written stays while the second waits, which then makes what is missing and no more."""
    folder, waits, made = tmp_path / "a", threading.Event(), []
    monkeypatch.setattr(cache_filling, "say", lambda text: waits.set())
    with pytest.raises(KeyboardInterrupt):  # the cache is there, and nothing in it
        fill(folder, OURS, 20, Counted(stop_after=0), 6)
    wanted = cache_filling.Wanted(folder, OURS)

    def compute(spans):
        for span in spans:
            made.append(span.start)
            yield [SOURCE[span.start : span.stop]], {}

    with cache_filling.cache_lock(folder, cache_filling.Share(*first)):
        (half := folder / ".00001.safetensors.99").write_bytes(b"half")
        share = cache_filling.Share(*second)
        other = threading.Thread(target=cache_filling.fill_all, args=([wanted], 20, compute, 6, share, 0))
        other.start()
        assert waits.wait(60) and half.exists() and made == []
    other.join(60)
    assert not other.is_alive() and not half.exists()
    assert made == ([0, 6, 12, 18] if second == (0, 1) else [6, 18])


def test_shares_do_not_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_filling, "say", pytest.fail)
    with contextlib.ExitStack() as held:
        for rank in range(3):
            held.enter_context(cache_filling.cache_lock(tmp_path, cache_filling.Share(rank, 3)))
        assert cache_filling.is_written(tmp_path)
    assert not cache_filling.is_written(tmp_path)
