"""Compiling without a compiler, which takes long: what is traced is run as it is."""

from functools import partialmethod

import pytest
import torch
from torch import nn


@pytest.fixture
def traced(monkeypatch):
    """The graphs that are made, with their inputs: traced and differentiated as by the compiler, but no code is generated."""
    found = []

    def backend(graph, inputs):
        found.append(inputs)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    yield found
    torch._dynamo.reset()
