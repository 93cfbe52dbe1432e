"""What a checkpoint holds, and whether two hold the same."""

import torch

from maskalign_lab.base.checkpoints import load_tensors, step_folder


def content(folder, step=None):
    """All tensors of a step, by file."""
    files = sorted(step_folder(folder, step).glob("*.safetensors"))
    return {file.stem: load_tensors(file.parent, file.stem) for file in files}


def same(a, b):
    """Refuse any difference."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys() and all(torch.equal(a[name][k], b[name][k]) for k in a[name]), name
