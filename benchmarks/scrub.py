"""Scrubbing: from a slider's event to the changed traces of the figure, in the kernel.

The scrubber of study 01 changes values in a figure that stays. The plain way makes the figure of the new state and
the widget that holds it. What the browser adds is measured by `tests/workbench/test_browser_scrubber.py`.

    python benchmarks/scrub.py [--short]
"""

import itertools
import json

import numpy as np
import torch

from maskalign_lab.gradient_norms import Survey
from maskalign_lab.studies.gradient_norms.film import Film, scrubber
from maskalign_lab.workbench.benchmarking import Comparison, in_turn, run_script
from maskalign_lab.workbench.figure_widget import Drawing
from maskalign_lab.workbench.plotly_figure import figure, values
from maskalign_lab.workbench.scrubber import Scrubber, Stage, pickers

PLAIN, OURS = "plain: a new figure for each state", "ours: values of the figure that is there"


def film(times: int, images: int, side: int = 8, pixels: int = 32) -> Film:
    """A film of the study's form, with noise in it."""
    rng, t = np.random.default_rng(0), np.linspace(0, 1, times)
    clean = rng.integers(0, 256, (images, pixels, pixels, 3), dtype=np.uint8)
    noised = rng.integers(0, 256, (images, times, pixels, pixels, 3), dtype=np.uint8)
    norms = rng.random((2, images, times, side**2), dtype=np.float32)
    surveys = [Survey(t, *rng.random((2, times, side**2), dtype=np.float32), 4096) for _ in range(2)]
    return Film(["one run", "another"], t, [f"picture {i}" for i in range(images)], clean, noised, norms, surveys)


def sent(scrubber: Scrubber) -> dict[str, str]:
    """How much each way has to tell the browser, as JSON."""
    panels = scrubber.view(**scrubber.defaults())
    changed = json.dumps(values(panels), default=lambda array: array.tolist())
    return {"kB sent": f"{len(changed) / 1e3:.0f} against {len(figure(panels).to_json()) / 1e3:.0f}"}


def measure(short: bool, device: torch.device) -> list[Comparison]:
    """Move the slider to and fro."""
    study = scrubber(film(5 if short else 21, 2 if short else 8))
    stage, axis = Stage(study), study.slider()
    slider = pickers(stage)[axis.name]
    ours, plain = itertools.cycle(range(len(axis.values))), itertools.cycle(axis.values)

    def move() -> None:
        slider.index = next(ours)

    def redraw() -> None:
        Drawing(figure(study.view(**study.defaults() | {axis.name: next(plain)})))

    seconds = in_turn({PLAIN: redraw, OURS: move}, 5 if short else 60)
    if stage.error.value:
        raise AssertionError(f"the scrubber shows an error: {stage.error.value}")
    late = {"p95 of ours": f"{1e3 * np.quantile(seconds[OURS], 0.95):.0f} ms"}
    return [Comparison("scrub, in the kernel", seconds, PLAIN, late | sent(study))]


if __name__ == "__main__":
    run_script(__file__)
