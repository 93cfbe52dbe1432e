"""Processes of tests that begin at once: forked from one that has imported what trains, which takes seconds each time."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from shared.clone import ROOT

MODULES = ("phased", "ranks", "survive")  # of this folder


class Forked:
    """A process that is no child of ours; of `subprocess.Popen` what the tests use."""

    def __init__(self, server: socket.socket, pid: int, stdout: io.TextIOBase):
        self.server, self.pid, self.stdout, self.returncode = server, pid, stdout, None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Its exit code, as soon as it ends."""
        if self.returncode is None:
            self.server.settimeout(timeout)
            self.server.sendall(json.dumps({"wait": self.pid}).encode())
            self.returncode = int(self.server.recv(100))
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, None]:
        """All that it printed, when it has ended."""
        with self.stdout:
            said = self.stdout.read()
        self.wait(timeout)
        return said, None


class Forks:
    """The process that forks."""

    def __init__(self):
        self.server, there = socket.socketpair()
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "shared")))
        self.env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__)), str(there.fileno())]
        self.process = subprocess.Popen(command, env=self.env, pass_fds=[there.fileno()])
        there.close()

    def start(self, program: str, *words: object, **env: str) -> Forked:
        """A module of this folder as a script, or code, with words behind it and more in its environment."""
        reading, writing = os.pipe()
        asked = {"program": program, "words": list(map(str, words)), "env": self.changed() | env}
        self.server.settimeout(120)  # the first time it imports
        socket.send_fds(self.server, [json.dumps(asked).encode()], [writing])
        os.close(writing)
        return Forked(self.server, int(self.server.recv(100)), open(reading))

    def changed(self) -> dict[str, str | None]:
        """What is other in the environment since it began; None is gone."""
        now = os.environ | {name: self.env[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
        return {name: now.get(name) for name in now.keys() | self.env.keys() if now.get(name) != self.env.get(name)}

    def end(self) -> None:
        self.server.close()
        self.process.wait(30)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """One for all tests of a worker."""
    forks = Forks()
    yield forks
    forks.end()


# ---- in the process that forks


def become(asked: dict, writing: int) -> None:
    """Be the process that was asked for, and end as an interpreter does."""
    os.dup2(writing, 1), os.dup2(writing, 2)
    for name, value in asked["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    code = 1
    try:
        sys.argv[1:] = asked["words"]
        if asked["program"] in MODULES:
            sys.modules[asked["program"]].main()
        else:
            exec(compile(asked["program"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def serve(connection: socket.socket) -> None:
    """Fork, or wait for a fork, as often as one is told to."""
    while True:
        message, writing, *_ = socket.recv_fds(connection, 100_000, 1)
        if not message:
            return
        asked = json.loads(message)
        if "wait" in asked:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        elif not (answer := os.fork()):
            connection.close()
            become(asked, *writing)
        for each in writing:
            os.close(each)
        connection.sendall(str(answer).encode())


if __name__ == "__main__":
    import torch

    for name in (*MODULES, "accelerate", "maskalign_lab.runs.preparing"):
        import_module(name)
    torch.set_num_threads(1)
    serve(socket.socket(fileno=int(sys.argv[1])))
