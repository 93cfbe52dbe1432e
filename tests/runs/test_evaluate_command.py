"""Two processes draw samples, are told to stop, and the same samples come of it as of one that was left alone."""

import os
import signal
import subprocess
import sys
import time

import torch
from shared.sampled import random_run

from maskalign_lab.cli import main
from maskalign_lab.runs.run import load_run
from maskalign_lab.runs.sample_plan import plan_of
from maskalign_lab.runs.sampling_shards import make_samples

FILES = 8


def files_in(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_two_processes_that_are_told_to_stop_lose_no_file_and_change_no_byte(tmp_path, capfd):
    run, folder = random_run(tmp_path / "run"), tmp_path / "samples"
    few = ["--n", str(64 * FILES - 5), "--steps", "16", "--precision", "float32", "--shard-size", "64", "--no-figures"]
    words = ["evaluate", str(run.path), *few, "--samples", str(folder), "--device", "cpu"]
    command = [sys.executable, "-m", "maskalign_lab.cli", *words, "--processes", "2"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    while process.poll() is None and len(files_in(folder)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert 2 <= len(files_in(folder)) < FILES
    assert main([*words, "--npz", str(tmp_path / "adm.npz")]) == 0
    assert "samples in" in capfd.readouterr().out and len(files_in(folder)) == FILES
    asked = plan_of(load_run(run.path), n=64 * FILES - 5, steps=16, precision="float32")
    make_samples(run, asked, tmp_path / "alone", shard_rows=64, print_every=0)
    for name in files_in(folder):
        assert (folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
