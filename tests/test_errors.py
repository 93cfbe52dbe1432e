"""What a user gets wrong, or a machine cannot give, is told in one sentence with exit code 2; a bug keeps its traceback."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared.notebooks import write

from maskalign_lab import cli
from maskalign_lab.base import files
from maskalign_lab.base.checkpoints import load_tensors
from maskalign_lab.base.devices import devices, resolve_device
from maskalign_lab.base.paths import home_of
from maskalign_lab.cli import main, sentence_of
from maskalign_lab.runs.facts import Facts
from maskalign_lab.runs.official_files import export_run
from maskalign_lab.runs.presets import make_recipe
from maskalign_lab.runs.run import Run, build
from maskalign_lab.training.stopping import NonFinite
from maskalign_lab.workbench import jobs
from maskalign_lab.workbench.commands import COMMANDS

TRAIN = ["train", "sit", "--preset", "smoke", "training.steps=1", "data.n=16", "network.depth=1"]
TAGGED = {"tags": ["parameters"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Results, cache and home of a test are in its folder."""
    monkeypatch.setenv("MASKALIGN_LAB_OUTPUT", str(tmp_path / "runs"))
    monkeypatch.setenv("MASKALIGN_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def told(words, capsys):
    """What the command says about a mistake: one line, with exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said


# ---- what is typed


@pytest.mark.parametrize(
    "words, message",
    [
        ([*TRAIN, "--device", "cuda:7"], "there is no device 'cuda:7' here. Valid: auto, cpu"),
        ([*TRAIN, "--device", "gpu"], "there is no device 'gpu' here"),
        (["sample", "repa-shapes", "--device", "gpu"], "there is no device 'gpu' here"),
        (["measure", "repa-shapes", "--device", "gpu"], "there is no device 'gpu' here"),
        (["teach", "shapes", "--device", "gpu"], "there is no device 'gpu' here"),
        (["judge", "shapes", "--device", "gpu"], "there is no device 'gpu' here"),
        (["make", "repa-shapes", "--device", "gpu"], "there is no device 'gpu' here"),
        ([*TRAIN, "network.heads=0"], "network.heads=0: expected at least 1"),
        ([*TRAIN, "network.width=-8"], "network.width=-8: expected at least 1"),
        ([*TRAIN, "network.depth=0"], "network.depth=0: expected at least 1"),
        ([*TRAIN, "network.patch_size=0"], "network.patch_size=0: expected at least 1"),
        ([*TRAIN, "network.mlp_ratio=0"], "network.mlp_ratio=0.0: expected a finite number above 0"),
        (["sample", "repa-shapes", "--n", "0"], "--n 0: expected at least one image of each class"),
        (["sample", "repa-shapes", "--guide", "repa"], "no run 'repa' (a folder with recipe.json). Did you mean 'repa-shapes'?"),
        (["sample", "repa-shapes", "--guide", "sit-shapes@5"], "has no step 5; it has [7000]"),
        (["sample", "repa-shapes", "--guide", "reg-shapes"], "'reg-shapes@7000' has channels of the class token 128: expected 0"),
        (["evaluate", "repa-shapes", "--guide", "sit-shapes"], "does nothing at guidance 1, which is off: expected another"),
        (["measure", "repa-shapes", "--n", "1"], "expected at least 4"),
        (["import", "none.pt", "--config", "[1]"], "--config '[1]': expected names and values"),
        (["import", "none.pt", "--config", "{"], "--config '{' is not JSON"),
        (
            ["import", "none.pt", "--dataset", "shaeps"],
            "Did you mean 'shapes'? Valid: shapes, digits, photos, folder:PATH, hf:NAME, latents",
        ),
        (["import", "none.pt", "--dataset", "folder:none"], "folder 'none' does not exist"),
        ([*TRAIN, "--dataset", "folder:~nobody-of-this-name"], "there is no such user"),
        ([*TRAIN, "--out", "~nobody-of-this-name/x"], "there is no such user"),
        (["sample", "repa-shapes", "--out", "~nobody-of-this-name/x.png"], "there is no such user"),
        (["measure", "repa-shapes", "--out", "~nobody-of-this-name/x.json"], "there is no such user"),
        (["run", "01", "--out", "~nobody-of-this-name/x"], "there is no such user"),
        (["open", "~nobody-of-this-name/x"], "there is no such user"),
        (["run", "01", "-p", "run", "NOSUCH"], "no run 'NOSUCH'"),
        (["run", "01", "-p", "dataset", "shaeps"], "Did you mean 'shapes'?"),
        (["run", "01", "-p", "device", "gpu"], "there is no device 'gpu' here"),
        (["run", "03", "-p", "overrides", "training.stepz=3"], "Did you mean 'training.steps'?"),
        (["run", "06", "-p", "overrides", "method.tau=many"], "method.tau='many'"),
        (["jobs", "none"], "expected job.json"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line_before_any_work(words, message, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "perform", lambda *_: pytest.fail("a kernel was started"))
    monkeypatch.setattr("maskalign_lab.runs.watching.fit", lambda *_: pytest.fail("a training was started"))
    monkeypatch.setattr("maskalign_lab.diffusion.sampling.last_sample", lambda *_: pytest.fail("it sampled"))
    monkeypatch.setattr("maskalign_lab.runs.evaluation.measure", lambda *_: pytest.fail("it measured"))
    assert message in told(words, capsys)


def test_debug_shows_where_a_mistake_was_found():
    with pytest.raises(ValueError, match="network.heads=0"):
        main([*TRAIN, "network.heads=0", "--debug"])


def test_overrides_of_any_method_are_let_through(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(jobs, "perform", lambda job, *_: started.append(job.parameters) or job.end("ok", 0))
    words = "method.tau=0.5 training.steps=3 data.teacher=tiny:mine"
    assert main(["run", "06", "-p", "overrides", words, "-p", "run", "ahpa-shapes"]) == 0
    assert started[0]["run"] == "ahpa-shapes"  # a name stays a name, and a path becomes absolute
    assert started[0]["overrides"] == f"method.tau=0.5 training.steps=3 data.teacher=tiny:{os.getcwd()}/mine"


@pytest.mark.parametrize(
    "text, message",
    [
        ("no json", "is no notebook"),
        ("[1]", "has no list of cells"),
        ('{"worksheets": [], "nbformat": 3}', "expected a notebook of nbformat 4, this one is of nbformat 3"),
        (json.dumps({"cells": [{"cell_type": "code", "source": "x"}]}), "0 cells have the tag"),
        (json.dumps({"cells": [{"metadata": TAGGED, "source": 'p: str = "a"\n%matplotlib inline'}]}), "'%matplotlib inline'"),
        (json.dumps({"cells": [{"metadata": TAGGED, "source": "p: str = ("}]}), "'p: str = (': this is no Python"),
        (json.dumps({"cells": [{"metadata": TAGGED, "source": "p: str = 'a'\n  q: int = 1"}]}), "'q: int = 1'"),
        (json.dumps({"cells": [{"metadata": TAGGED, "source": "p: int = {[]: 1}"}]}), "expected NAME: TYPE = VALUE"),
    ],
)  # fmt: skip
def test_notebooks_of_another_format(text, message, tmp_path, capsys):
    (tmp_path / "study.ipynb").write_text(text)
    assert message in told(["run", tmp_path / "study.ipynb"], capsys)


# ---- what a machine cannot give


@pytest.mark.parametrize("words", [TRAIN, ["run", "01"], ["export", "sit-shapes"]])
def test_places_that_cannot_be_written(words, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in told([*words, "--out", tmp_path / "file" / "below.safetensors"], capsys)


def test_a_full_disk_names_the_file_and_leaves_no_half_of_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        files.write_atomic(tmp_path / "table.csv", "a")
    assert sentence_of(caught.value) == f"No space left on device: {str(tmp_path / 'table.csv')!r}"
    assert not list(tmp_path.iterdir())


def test_weights_that_cannot_be_fetched(monkeypatch, capsys):
    def offline(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("timm.create_model", offline)
    words = ["train", "repa", "--preset", "smoke", "data.n=16", "data.teacher=timm:vit_tiny_patch16_224"]
    assert "could not be loaded: no route to the hub" in told(words, capsys)


def test_a_device_is_one_that_is_there(monkeypatch):
    assert devices()[0] == "cpu" and resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    assert resolve_device("auto") == torch.device("cuda") and resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="no device 'cuda:2' here. Valid: auto, cpu, cuda, cuda:0, cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    "error, sentence",
    [
        (NonFinite("step 2: not finite"), "step 2: not finite"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied: '/x'"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), "not enough memory (CUDA out of memory. Tried to)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory (DefaultCPUAllocator: can't"),
        (MemoryError(), "not enough memory (none is left)"),
    ],
)  # fmt: skip
def test_what_is_no_bug(error, sentence, monkeypatch, capsys):
    def broken(options):
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", (cli.Doctor, broken))
    assert told(["doctor"], capsys).startswith(f"error: {sentence}")


@pytest.mark.parametrize(
    "error", [KeyError("cells"), TypeError("no"), ZeroDivisionError(), RuntimeError("shapes"), AssertionError()]
)
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def broken(options):
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", (cli.Doctor, broken))
    with pytest.raises(type(error)):
        main(["doctor"])


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged"):
        load_tensors(tmp_path, "ema")


# ---- where things go


def test_home_is_filled_in_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "repa-shapes", "--out=~/repa.safetensors"]) == 0
    assert load_file(tmp_path / "home" / "repa.safetensors") and not (tmp_path / "~").exists()
    (tmp_path / "home" / "x").mkdir()
    assert home_of("~/x") == tmp_path / "home" / "x"
    words = ["sample", "repa-shapes", "--classes", "0", "--n", "1", "--steps", "1", "--solver", "euler"]
    assert main([*words, "--out=~/grid.png"]) == 0
    assert (tmp_path / "home" / "grid.png").is_file() and not (tmp_path / "~").exists()


def test_an_import_names_data_and_autoencoder_by_absolute_paths(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("maskalign_lab.runs.official_files.import_run", lambda *words: given.append(words))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats" / "a").mkdir(parents=True)
    words = ["import", "~/x.pt", "--out", "run", "--dataset", "folder:cats", "--autoencoder", "tiny:mine"]
    words += ["--teacher", "tiny:theirs"]
    assert main([*words, "--config", '{"num_heads": 12}']) == 0
    names = f"folder:{tmp_path}/cats", f"tiny:{tmp_path}/mine"
    assert given == [
        (tmp_path / "home" / "x.pt", Path("run"), "", {"num_heads": 12}, *names, None, f"tiny:{tmp_path}/theirs")
    ]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    recipe = make_recipe("jit", "smoke")
    run = Run(tmp_path, recipe, Facts(10), 1, *build(recipe, Facts(10)))
    with pytest.raises(ValueError, match="no official layout of JiT"):
        export_run(run, tmp_path / "new" / "jit.safetensors")
    assert not (tmp_path / "new").exists()


def test_papermill_takes_a_path_as_it_is(tmp_path):
    from papermill.parameterize import parameterize_path

    from maskalign_lab.workbench.notebook_kernel import literal

    path = tmp_path / "sw{seed}" / "{}" / "study.ipynb"
    assert parameterize_path(literal(path), {"seed": 3}) == str(path)


def test_a_job_writes_to_the_folder_that_was_named(tmp_path, monkeypatch):
    from maskalign_lab.workbench import notebook_kernel

    seen = []
    monkeypatch.setattr(notebook_kernel.papermill, "execute_notebook", lambda *words, **_: seen.append(words[:2]))
    write(tmp_path / "study{seed}.ipynb")
    job = jobs.run_study(tmp_path / "study{seed}.ipynb", {"seed": 3}, tmp_path / "sw{seed}")
    assert job.folder == str(tmp_path / "sw{seed}")
    assert [text.format(seed=3) for text in seen[0]] == [
        str(tmp_path / "study{seed}.ipynb"),
        str(tmp_path / "sw{seed}" / "study{seed}.partial.ipynb"),
    ]
