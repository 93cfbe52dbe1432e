#!/usr/bin/env python3
"""MaskAlign Lab from a bare clone, with Python and nothing else.

  python3 lab.py run [NN]      execute study NN (default 01) and write it, with its figures, under runs/
  python3 lab.py lab           open the studies in JupyterLab
  python3 lab.py test          run all tests
  python3 lab.py export        notebooks -> maskalign_lab/*.py, then clean the notebooks
  python3 lab.py refresh NN    execute study NN and keep its outputs in nbs/
  python3 lab.py figures       write figures/ anew

The first call makes .venv and installs into it; a later call installs only what changed.
What follows a command is passed on: `python3 lab.py run 01 -p preset gpu`, `python3 lab.py test -k taps`.
"""

# Standard library only, in syntax that Python 3.8 reads: one too old for the project must still say which is needed.
import configparser
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "lab.json"  # what is installed, and where the environment was made
WINDOWS = os.name == "nt"
BIN = VENV / ("Scripts" if WINDOWS else "bin")
NEWEST = (3, 14)
PIP = "-m pip install --no-compile".split()  # of 21,000 modules few are ever imported, and Python compiles these itself
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STUDIES = """01_gradient_norms 02_position_preference 03_prediction_targets 04_reg 05_maskalign 06_ahpa 07_rae 08_dsd
    09_full_scale""".split()


def stop(message):
    sys.exit(f"lab.py: {message}")


def say(message):
    print(message, flush=True)


def quietly(*command, **options):
    """Runs a command to its end and returns its result, or None if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    except OSError:
        return None


def tool(name):
    """A program inside .venv."""
    return str(BIN / (name + ".exe" if WINDOWS else name))


def call(*command, cwd=None, **env):
    """Runs a command of .venv and returns its exit code; Ctrl-C is left to the command, a SIGTERM is handed down."""
    path = str(BIN) + os.pathsep + os.environ.get("PATH", "")
    # the last one: a `python3` kernel in the user's home must not win over the kernel in .venv
    env = dict(os.environ, PATH=path, VIRTUAL_ENV=str(VENV), JUPYTER_PREFER_ENV_PATH="1", **env)
    process = subprocess.Popen(command, cwd=cwd, env=env)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            pass


# ---- the interpreter


def oldest():
    """The lowest (major, minor) that the project runs on."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return tuple(map(int, settings["DEFAULT"]["min_python"].split(".")))


def version_of(python, needs="sys"):
    """(major, minor) of an interpreter; None if it does not start or lacks the module that it needs."""
    done = quietly(str(python), "-c", f"import sys, {needs}; print(*sys.version_info[:2])")
    return tuple(map(int, done.stdout.split())) if done and done.returncode == 0 else None


def fits(version):
    return version is not None and oldest() <= version <= NEWEST


def find_python():
    """This interpreter if it fits, else the newest that fits on PATH or among pyenv's."""
    if fits(sys.version_info[:2]):
        return getattr(sys, "_base_executable", None) or sys.executable
    names = [f"python3.{minor}" for minor in range(NEWEST[1], oldest()[1] - 1, -1)]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [shutil.which(name) for name in names]
    found += [path / "bin" / "python" for name in names for path in sorted(pyenv.glob(f"{name[6:]}.*"))]
    for path in found:
        if path and fits(version_of(path)):
            return str(path)
    needed, this = "{}.{} to {}.{}".format(*oldest(), *NEWEST), "{}.{}".format(*sys.version_info)
    stop(
        f"Python {needed} is needed, this is {this}, and neither PATH nor {pyenv} holds another one. "
        "Install one with your package manager or from https://www.python.org/downloads"
    )


# ---- the environment


def make_venv():
    python = find_python()
    say(f"Making {VENV} with {python}")
    for maker in ([python, "-m", "venv"], [python, "-m", "virtualenv"], ["virtualenv", "-p", python]):
        done = quietly(*maker, "--clear", str(VENV))
        if done and done.returncode == 0:
            return
    shutil.rmtree(VENV, ignore_errors=True)
    package = "python{}.{}-venv".format(*version_of(python))
    stop(
        f"{python} lacks venv with ensurepip, and virtualenv is not there either. "
        f"On Debian and Ubuntu: apt-get install python3-venv (or {package})"
    )


def read_stamp():
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def set_up(extras):
    """Makes .venv hold the project with `extras`; does nothing if it does already."""
    version, stamp = version_of(tool("python"), "pip"), read_stamp()
    if not fits(version) or stamp.get("root", str(ROOT)) != str(ROOT):  # one that was moved is broken
        make_venv()
        version, stamp = version_of(tool("python"), "pip"), {}
    packaging = [(ROOT / name).read_bytes() for name in ("settings.ini", "pyproject.toml", "setup.py")]
    mark = hashlib.sha256(b"\0".join([*packaging, repr(version).encode()])).hexdigest()
    if stamp.get("mark") == mark and set(extras) <= set(stamp["extras"]):
        return
    wanted = {"root": str(ROOT), "extras": sorted({*extras, *stamp.get("extras", [])})}
    STAMP.write_text(json.dumps(wanted))  # without a mark: an installation that is interrupted must be done again
    install(wanted["extras"])
    STAMP.write_text(json.dumps({**wanted, "mark": mark}))


def install(extras):
    say(f"Installing into {VENV}, nothing outside of it: about 300 MB of packages, and PyTorch")
    if not any(VENV.glob("[Ll]ib/**/site-packages/torch/version.py")):
        install_torch()
    target = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    if call(tool("python"), *PIP, "--disable-pip-version-check", *quiet, "-e", target):
        stop(f"the installation failed, see above. Call again to go on, or delete {VENV} to start afresh")
    done = quietly(tool("python"), "-c", "import torch, torchvision, timm; print(torch.__version__)")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        stop(
            f"PyTorch, torchvision and timm do not work together: {why}\nDelete {VENV} and call again. "
            f"What is installed: {tool('python')} -m pip list"
        )
    say(f"Installed, with PyTorch {done.stdout.strip()}")


def has_nvidia():
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def install_torch():
    """On Linux without an NVIDIA driver: PyTorch from its CPU-only index. Elsewhere PyPI's own build is right."""
    if not sys.platform.startswith("linux"):
        return say("PyTorch: a download of about 150 MB")
    if has_nvidia():
        return say("PyTorch with CUDA: a download of about 3 GB")
    say("PyTorch without CUDA, as there is no NVIDIA driver: a download of about 200 MB")
    # torch and torchvision of one index fit each other: both or neither, and no other index has a say
    keep = ("PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") or key in keep}
    words = "--no-deps --retries 0 --timeout 10 torch torchvision --index-url".split()
    done = quietly(tool("python"), *PIP, *words, CPU_INDEX, env=dict(env, PIP_CONFIG_FILE=os.devnull))
    if done.returncode:
        say(f"  {CPU_INDEX} gave none: taking the usual build with CUDA, about 3 GB")


# ---- the commands


def run(rest):
    study = rest.pop(0) if rest and not rest[0].startswith("-") else "01"
    preset = [] if "preset" in rest else ["-p", "preset", "laptop"]
    return call(tool("maskalign-lab"), "run", study, *preset, *rest)


def lab(rest):
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return call(tool("jupyter-lab"), *root, f"nbs/{STUDIES[0]}.ipynb", *rest, cwd=ROOT)


def test(rest):
    def timed(name, *command, **env):
        say(f"\n== {name}")
        start = time.time()
        code = call(*command, cwd=ROOT, **env)
        return name, code, time.time() - start

    workers = 2
    threads = str(max(1, (os.cpu_count() or 1) // workers))  # all workers together use each core once
    spread = ("--dist", "loadfile", "--no-loadscope-reorder")  # which tests share what they made: tests/conftest.py
    results = [
        timed("nbs/lib", tool("nbdev-test"), "nbs/lib", "--n-workers", str(workers), OMP_NUM_THREADS=threads),
        timed("tests", tool("python"), "-m", "pytest", "-n", str(workers), *spread, *rest, OMP_NUM_THREADS=threads),
    ]
    say("")
    for name, code, seconds in results:
        say(f"{name}: {'FAILED' if code else 'passed'} in {seconds:.0f} s")
    return int(any(code for _, code, _ in results))


def modules_of(notebook):
    """The modules that a notebook exports: one, if all is well."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    directive = re.compile(r"^\s*#\s*\|\s*default_exp\b\s*:?\s*(\S+)", re.MULTILINE)
    return [module for source in code for module in directive.findall(source)]


def strays(nbs):
    """Why nothing under `nbs` should be exported, a line each: a stray copy would take over a module."""
    problems, homes = [], {}
    for path in sorted(nbs.rglob("*.ipynb")):
        name, modules = path.relative_to(nbs).as_posix(), modules_of(path)
        if ".ipynb_checkpoints" in name:
            continue
        for module in modules:
            homes.setdefault(module, []).append(f"nbs/{name}")
        if not name.startswith("lib/") and name[: -len(".ipynb")] not in STUDIES:
            problems.append(f"nbs/{name} is neither a study nor in nbs/lib; move it out of nbs/")
        elif name.startswith("lib/") and [f"lib/{module.replace('.', '/')}.ipynb" for module in modules] != [name]:
            found = " and ".join(modules) or "no module"
            problems.append(f"nbs/{name} exports {found}, and the notebook of module a.b is nbs/lib/a/b.ipynb")
    twice = [f"{module} is exported by {' and by '.join(names)}" for module, names in homes.items() if len(names) > 1]
    return problems + twice


def export(rest):
    problems = strays(ROOT / "nbs")
    if problems:
        stop("nothing was exported:\n  " + "\n  ".join(problems))
    return call(tool("nbdev-export"), *rest, cwd=ROOT) or call(tool("nbdev-clean"), cwd=ROOT)


def refresh(rest):
    return call(tool("maskalign-lab"), "refresh", *rest)


def figures(rest):
    return call(tool("maskalign-lab"), "figures", *rest)


COMMANDS = {command.__name__: command for command in (run, lab, test, export, refresh, figures)}


def main(argv):
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(__doc__.strip())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        stop(f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}")
    set_up([] if name in ("run", "lab") else ["dev"])
    return COMMANDS[name](rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
