"""REPA's figures over depth: marks at the aligned block, networks of different depths, and times that differ."""

import numpy as np
import pytest

from maskalign_lab.measure.depth_figures import over_depth_figure
from maskalign_lab.measure.representation import OverDepth
from maskalign_lab.workbench.plots import png


def found(depths, times=(0.2, 0.7), chance=0.1):
    values = np.arange(len(times) * len(depths)).reshape(len(times), len(depths)) / 10
    return {key: OverDepth(times, depths, values, np.full(values.shape, 0.02), chance) for key in ("probe", "CKNNA")}


def test_a_run_has_its_mark_at_the_aligned_block_and_its_band():
    figure = over_depth_figure({"shallow": found((1, 2, 3)), "deep": found((1, 4, 8, 12))}, {"deep": 4, "shallow": 9})
    axis = figure.axes[1]
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"]
    assert marks == [(4, 0.5)] and len(axis.collections) == 2
    assert [axis.get_title() for axis in figure.axes[:2]] == ["t = 0.2", "t = 0.7"] and png(figure)


def test_runs_at_other_times_are_refused():
    with pytest.raises(ValueError, match=r"all at the same times; these are at \{'a': \(0.2, 0.7\), 'b': \(0.5,\)\}"):
        over_depth_figure({"a": found((1, 2)), "b": found((1, 2), (0.5,))})
    with pytest.raises(ValueError, match="one or more runs"):
        over_depth_figure({})
