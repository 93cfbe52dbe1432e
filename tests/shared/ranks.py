"""Trainings one after another in a process among several: ranks.py FOLDER:STEPS... A folder with a star is one for each process."""

import os
import sys
from pathlib import Path

import survive


def main():
    """What each process does."""
    for training in sys.argv[1:]:
        folder, steps = training.rsplit(":", 1)
        try:
            survive.train(Path(folder.replace("*", os.environ["RANK"])), int(steps))
        except ValueError as error:
            print("refused:", error, flush=True)
