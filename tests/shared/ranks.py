"""Trainings in several processes, forked from one that has imported everything: python ranks.py PROCESSES FOLDER:STEPS..."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import survive
import torch
from accelerate import Accelerator  # noqa: F401  imported before the fork


def be(rank, world, port, trainings):
    """One of the processes: the trainings one after another. A folder with a star is one for each process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for training in trainings:
        folder, steps = training.rsplit(":", 1)
        try:
            survive.train(Path(folder.replace("*", str(rank))), int(steps))
        except ValueError as error:
            print("refused:", error, flush=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    world, port, fork = int(sys.argv[1]), free_port(), multiprocessing.get_context("fork")
    ranks = [fork.Process(target=be, args=(rank, world, port, sys.argv[2:])) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))
