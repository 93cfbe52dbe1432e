"""Recorded numbers of the official code, and networks opened from them."""

import json
from collections import defaultdict
from functools import cache, partial
from types import SimpleNamespace

from safetensors import safe_open
from shared.clone import ROOT
from torch.testing import assert_close

from maskalign_lab.runs.official import from_official

GOLDEN = ROOT / "tests" / "golden"
close = partial(assert_close, rtol=1e-4, atol=2e-5)


@cache
def golden(name):
    """Inputs, outputs, weights and configuration of one recorded network; `parts` holds all tensors by prefix."""
    parts = defaultdict(dict)
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        for key in file.keys():
            prefix, _, rest = key.partition(".")
            parts[prefix][rest] = file.get_tensor(key)
    whole, config = config, config.get("model", config)  # some files tell more than the constructor's arguments
    return SimpleNamespace(
        config=config, whole=whole, inputs=parts["in"], out=parts["out"], weights=parts["model"], parts=dict(parts)
    )


@cache
def opened(name):
    record = golden(name)
    config = {k: v for k, v in record.config.items() if k != "num_steps"}
    return from_official(name.split("_")[0], config, record.weights)
