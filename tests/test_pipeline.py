"""The way of a paper's network, small: prepare, train on two processes, be killed, go on, sample, evaluate, look, export, import."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shared.inception import save_random_inception

from maskalign_lab.base.checkpoints import load_tensors, step_folder, steps_of
from maskalign_lab.cli import main
from maskalign_lab.data.datasets import load_dataset
from maskalign_lab.runs.run import load_run

STEPS, SAVE = 40, 4
MORE = ["data.autoencoder=tiny", "data.size=64", "data.crop=adm", "network.patch_size=2", "training.log_every=1"]
MORE += [f"training.steps={STEPS}", f"training.save_every={SAVE}", "training.precision=float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of JPEGs in classes, odd in size, and caches and outputs of its own."""
    root = tmp_path_factory.mktemp("pipeline")
    found = load_dataset("photos", 96, "train", 48)
    for k, (pixels, label) in enumerate(zip(found.pixels, found.labels)):
        file = root / "images" / found.classes[label] / f"{k:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((100 + k, 140 - k)).save(file, quality=92)
    return root


@pytest.fixture(scope="module")
def lab(place):
    """The command, as somebody types it, in a process of its own; `lab.here` runs it in this one, which has imported everything."""
    env = os.environ | {"MASKALIGN_LAB_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}

    def start(*words, **options):
        command = [sys.executable, "-m", "maskalign_lab.cli", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": place}
        return subprocess.Popen(command, env=env, **pipes, **options)

    def run(*words):
        process = start(*words)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def here(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASKALIGN_LAB_CACHE", str(place / "cache"))
            patch.chdir(place)
            assert main([*map(str, words)]) == 0

    run.start, run.here = start, here
    return run


def killed(process, run):
    """End a training and its processes at once, after it has saved, as a machine does that goes down."""
    while process.poll() is None and not steps_of(run):
        time.sleep(0.02)
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in everyone:
        each.kill()
    process.communicate()


def test_the_way_of_a_papers_network(lab, place):
    words = ["reg", "--preset", "smoke", "--dataset", f"folder:{place / 'images'}", "--device", "cpu", *MORE]
    run, weights = place / "run", place / "reg.safetensors"

    lab.here("prepare", *words)
    kept = {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.safetensors")}
    assert kept

    killed(lab.start("train", *words, "--processes", 2, "--out", run), run)
    assert 0 < (stopped := max(steps_of(run))) < STEPS
    lab("train", *words, "--processes", 2, "--out", run)
    assert max(steps_of(run)) == STEPS
    log = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert log == sorted(set(log))  # nothing twice; a step's line comes after its checkpoint, so one may be lost
    assert set(range(1, STEPS + 1)) - set(log) <= {stopped}
    assert {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.safetensors")} == kept

    lab.here("sample", run, "--n", 1, "--steps", 2, "--out", place / "grid.png")
    assert Image.open(place / "grid.png").size[1] >= 64
    eye = save_random_inception(place / "inception.pth")
    few = ["--as", "reg", "--n", 12, "--steps", 2, "--samples", place / "samples", "--device", "cpu"]
    few += ["--inception", eye, "--reference-n", 24]
    lab.here("evaluate", run, *few, "--out", place / "row.json")
    row = json.loads((place / "row.json").read_text())
    assert (row["number"], row["step"], row["labels"]) == (12, STEPS, "random")
    assert "tiny" in row["autoencoder"] and row["FID"] > 0

    lab.here("run", "01", "-p", "preset", "smoke", "-p", "seeds", 1, "-p", "run", run, "--out", place / "job")
    assert (place / "job").is_dir()

    lab.here("export", run, "--out", weights)
    lab.here(
        "import", weights, "--out", place / "again", "--autoencoder", "tiny", "--dataset", f"folder:{place / 'images'}"
    )
    ours, theirs = load_run(run).net.state_dict(), load_run(place / "again").net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_file(weights).keys() and load_tensors(step_folder(run), "ema").keys() == ours.keys()
