"""From the signal to the exit: a training that is told to stop finishes its step, saves all and leaves, beside one of its steps.

Schedulers kill what is still there after a while, often 30 s, some 10. The training runs in a process of its own, in a folder of
its own; once it has told its first steps it gets SIGTERM, and the clock runs until the process is gone, with the code that asks
to be called again. The imports that Python takes down at the end are part of it.

    python benchmarks/stopping.py [--short] [--device cuda]
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from maskalign_lab.base.processes import PREEMPTED
from maskalign_lab.training.log import read_log
from maskalign_lab.workbench.benchmarking import Comparison, run_script

STEP, LEFT = "a step", "ours: from SIGTERM to the exit"
LIMIT = 10.0  # seconds that are asked for
TRAIN = """
import sys
from pathlib import Path
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import train
preset, folder, device = sys.argv[1:]
more = "data.n=256 training.steps=100000 training.log_every=4 training.save_every=100000"
train(make_recipe("repa", preset, overrides=more), Path(folder), device, print_every=0.01)
"""
PLANS = {"short": ("smoke",), "cpu": ("laptop",), "cuda": ("laptop", "gpu")}


def told_to_stop(preset: str, device: torch.device) -> tuple[float, float, int]:
    """Seconds of a step, seconds from the signal to the exit, bytes that were saved."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", TRAIN, preset, folder, str(device)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        told = 0
        while told < 3 and (line := process.stdout.readline()):
            told += line.startswith("step ")
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.communicate()
        left = time.perf_counter() - began
        if process.returncode != PREEMPTED:
            raise RuntimeError(f"the training ended with code {process.returncode}, expected {PREEMPTED}")
        first, *_, last = read_log(Path(folder) / "log.jsonl")
        saved = sum(path.stat().st_size for path in Path(folder).glob("steps/*/*"))
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]), left, saved


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """One comparison a preset."""
    found = []
    for preset in PLANS["short" if short else "cpu" if device.type == "cpu" else "cuda"]:
        steps, exits, saved = zip(*(told_to_stop(preset, device) for _ in range(1 if short else 6)), strict=True)
        note = f"{max(exits):.2f} s at most, {'within' if max(exits) <= LIMIT else 'not within'} {LIMIT:g} s"
        facts = {"saved": f"{saved[0] / 1e6:.1f} MB"}
        found.append(
            Comparison(f"told to stop, preset {preset}", {STEP: [*steps], LEFT: [*exits]}, STEP, facts, [note])
        )
    return found


if __name__ == "__main__":
    run_script(__file__)
