"""A method with a second phase, and a training of it in a process of its own: python phased.py FOLDER [STEPS] [RANKS...]."""

import os
import sys
from pathlib import Path

import torch
from shared.survive import batches
from torch import nn

from maskalign_lab.training.config import TrainingConfig
from maskalign_lab.training.execution import ExecutionConfig
from maskalign_lab.training.loop import fit
from maskalign_lab.training.methods import Draw, Losses, Method, Phase
from maskalign_lab.training.ranks import process_group


class Duel(Method, name=None):
    """A painter of noise, and a critic that scores it; each loss reaches into the other's weights."""

    def __init__(self, start=2, stop=None, **training):
        nn.Module.__init__(self)
        self.critic = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(()))  # what the main phase trains beside the network
        self.begins, self.ends, self.training_of_critic = start, stop, training
        self.seen = []

    def phases(self):
        return {"critic": Phase(self.critic, self.begins, self.ends, self.training_of_critic)}

    def draw(self, batch, step, generator):
        random = generator(step, "noise")
        return Draw(batch.y, torch.randn(batch.x.shape, generator=random, device=random.device), batch.y)

    def loss(self, state, batch, draw, phase="main"):
        frozen = [not weight.requires_grad for weight in self.critic.parameters()]
        self.seen.append((state.step, phase, self.critic.training, all(frozen), any(frozen)))
        painted = self.scale * state.model(draw.noise)
        score = self.critic(painted).mean()
        if phase == "critic":
            gap = score - self.critic(batch.x).mean()
            return Losses(gap + gap.square(), {"gap": gap})
        far = (painted - batch.x).square().mean()
        return Losses(far - 0.1 * score, {"far": far, "score": score})


def duel(**options):
    """A network and a method that train in a blink."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1), Duel(**options)


def config(steps=8, **changes):
    return TrainingConfig(
        **dict(steps=steps, save_every=3, log_every=1, warmup=3, precision="float32", ema=0.9, batch_size=8) | changes
    )


def train(folder, steps=8, batches=batches, settings=None, **options):
    """Train into a folder; the last step."""
    how = ExecutionConfig(accumulate=int(os.environ.get("ACCUMULATE", 1)))
    with process_group():
        for step in fit(*duel(**options), batches, settings or config(steps), folder, "cpu", how):
            print("step", step.step, flush=True)
    return step


def main():
    """What the process does."""
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
