"""A small training in a process of its own, for tests that interrupt it: python survive.py FOLDER [STEPS]."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from maskalign_lab.base.seeding import generator
from maskalign_lab.diffusion.objectives import Objective
from maskalign_lab.diffusion.sit import SiT
from maskalign_lab.training.config import TrainingConfig
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.log import cut_log, with_log
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Batch, MethodConfig, PlainSiT, outline
from maskalign_lab.training.ranks import process_group


def tiny():
    """A network and a method that train in a blink."""
    torch.manual_seed(0)
    net = SiT(input_size=8, patch_size=4, in_channels=3, width=16, depth=2, heads=2, num_classes=10)
    return net, PlainSiT(net, Objective(), MethodConfig())


def batches(step):
    g = generator(0, step, "data")
    return Batch(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 10, (8,), generator=g))


class Rows:
    """The same, by parts, from rows that lie in memory."""

    def __init__(self):
        parts = [batches(step) for step in range(4)]
        self.rows = {"x": torch.cat([part.x for part in parts]), "y": torch.cat([part.y for part in parts])}

    def places(self, portion):
        whole = np.arange(8) + 8 * (portion.step % 4)
        return {"y": ("y", whole), "x": ("x", whole[portion.part :: portion.parts])}

    def assemble(self, read, portion):
        mine = Batch(read["x"], read["y"][portion.part :: portion.parts])
        return mine, outline(mine, read["y"])


def config(steps=12, **changes):
    return TrainingConfig(
        **dict(steps=steps, save_every=3, log_every=1, warmup=2, precision="float32", ema=0.9) | changes
    )


def train(folder, steps=12, batches=batches, **changes):
    """Train into a folder; the network and its average."""
    folder.mkdir(parents=True, exist_ok=True)
    cut_log(folder)
    how = ExecutionConfig(accumulate=int(os.environ.get("ACCUMULATE", 1)))
    with process_group():
        for step in with_log(fit(*tiny(), batches, config(steps, **changes), folder, "cpu", how), folder, 1, 0):
            print("step", step.step, flush=True)
    return step.state


def main():
    """What the process does."""
    torch.set_num_threads(1)
    steps = map(int, sys.argv[2:3])  # may be left out
    train(Path(sys.argv[1]), *steps, batches=Rows() if os.environ.get("ROWS") else batches)


if __name__ == "__main__":
    main()
