"""What starting costs: `import maskalign_lab` and `maskalign-lab --help` beside a bare Python, each in a process of its own.

The tests of the command check that neither imports PyTorch.

    python benchmarks/import_time.py [--short]
"""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import torch

from maskalign_lab.base import paths
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script

BARE, OURS = "bare python", "import maskalign_lab"
HELP = "import sys; sys.argv = ['maskalign-lab', '--help']; from maskalign_lab.cli import main; main()"
CODES = {BARE: "pass", OURS: OURS, "maskalign-lab --help": HELP}


def start(code: str, environment: dict[str, str]) -> None:
    """A new interpreter that runs the code and ends."""
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """All in turn; bytecode is cached, as it is from the second start on."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(paths.PACKAGE.parent)
    starts = {name: partial(start, code, environment) for name, code in CODES.items()}
    seconds = in_turn(starts, 3 if short else 15, warmup=1)
    beyond = np.median(np.subtract(seconds[OURS], seconds[BARE]))
    return [Comparison("start", seconds, BARE, {"import beyond Python": f"{1e3 * beyond:.0f} ms"})]


if __name__ == "__main__":
    run_script(__file__)
