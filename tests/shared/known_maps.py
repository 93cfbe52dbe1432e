"""Rows of study 02's grid whose makers are known.

Every map is the sum of what objects cover, an effect of the teacher that a permuted teacher moves along, and one of the
student. Chance differs between halves of the images and between seeds. All other teachers have no effect, nor has a path; on
a torus there is no content. The angle makes all of a map at t = 0 and none at t = 1.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from maskalign_lab.base.seeding import rng
from maskalign_lab.encoders.teacher_variants import moved_order
from maskalign_lab.studies.gradient_norms.unevenness import TIMES
from maskalign_lab.studies.position_preference.arms import ARMS
from maskalign_lab.studies.position_preference.causes import CUT, FITTED, ON_TORUS, PLAIN, TEACHERS
from maskalign_lab.studies.position_preference.grid import change_of

COVERED = [0.1, 0.2, 0.2, 0.1, 0.2, 0.4, 0.4, 0.2] * 2  # of each of 16 positions, by objects
ALIGNED = {"REPA": ("REPA", f"REPA, {FITTED}", f"REPA, {CUT}"), "MaskAlign": ("MaskAlign", f"MaskAlign, {FITTED}")}


class Makers(NamedTuple):
    """The maps that known maps are sums of."""

    content: np.ndarray  # (n,)
    teachers: dict[str, np.ndarray]
    students: dict[str, np.ndarray]


def makers(content: float, teacher: float, student: float) -> Makers:
    """Maps of given sizes."""
    random, order = rng(0, 0, "known makers"), moved_order(16).numpy()
    own = teacher * random.standard_normal(16)
    teachers = {label: own * (label == PLAIN) for label in TEACHERS} | {"permuted": own[order]}
    names = ("untrained", "SiT", *ALIGNED["REPA"], *ALIGNED["MaskAlign"])
    students = {name: student * random.standard_normal(16) for name in names}
    return Makers(5 * content * (np.array(COVERED) - np.mean(COVERED)), teachers, students)


def cells_of(arm: str) -> list[tuple[str, str, str]]:  # student, teacher, change
    """The cases that a row of an arm holds."""
    student, change = arm.partition(",")[0], change_of(arm)
    if student == "SiT":
        read = ON_TORUS if change else TEACHERS
        return [(each, label, change) for label in read for each in ("untrained", student)]
    teacher = arm.removesuffix(change).removeprefix(student).strip(", ") or PLAIN
    return [(each, teacher, change) for each in ALIGNED[student]]


def known_case(made: Makers, chance: np.ndarray, student: str, teacher: str, change: str) -> dict[str, Any]:
    """A case as a row holds it, with chance (2, T, n) added."""
    map_ = made.content * (change != "torus") + made.teachers[teacher] + made.students[student]
    logs = torch.from_numpy(map_ + chance)
    logs = logs - logs.mean(-1, keepdim=True)
    angles = logs.mean(0) * torch.linspace(1, 0, len(TIMES))[:, None]
    found = {"marks": 2 * logs.softmax(-1), "logs": logs, "angles": angles, "spread": torch.from_numpy(made.content)}
    return {"student": student, "teacher": teacher} | {name: each.tolist() for name, each in found.items()}


def known_rows(seeds=2, chance=0.02, content=0.5, teacher=0.3, student=0.2, draw=0) -> list[dict[str, Any]]:
    """A table of all arms; `chance` is the standard deviation of a position in either half."""
    made, random = makers(content, teacher, student), rng(0, draw, "known rows")
    noise = lambda: chance * random.standard_normal((2, len(TIMES), 16))  # noqa: E731
    cases = lambda arm: [known_case(made, noise(), *names) for names in cells_of(arm)]  # noqa: E731
    facts = {"budget": "steps", "coverage": COVERED, "relative_flops": None}
    return [{"arm": arm.name, "seed": seed, **facts, "cases": cases(arm.name)} for arm in ARMS for seed in range(seeds)]


def true_shares(content: float, teacher: float, student: float, chance: float = 0.0) -> dict[str, float]:
    """What `variance_shares` should find: variances over positions, the mean over the levels of each factor."""
    made = makers(content, teacher, student)
    own = {name: each - each.mean() for name, each in made.students.items()}
    told = {name: each - each.mean() for name, each in made.teachers.items()}
    middle, mean = np.mean([*own.values()], 0), np.mean([*told.values()], 0)
    common = made.content + middle + mean
    direction = made.content / np.linalg.norm(made.content) if content else 5 * (np.array(COVERED) - np.mean(COVERED))
    direction = direction / np.linalg.norm(direction)
    along = (common @ direction) ** 2 / 16
    parts = {"content": along, "common": (common**2).mean() - along}
    parts |= {"teacher": np.mean([((each - mean) ** 2).mean() for each in told.values()])}
    parts |= {"student": np.mean([((each - middle) ** 2).mean() for each in own.values()])}
    parts |= {"path": 0.0, "together": 0.0, "chance": chance**2 / 2 * 15 / 16}
    return {name: part / sum(parts.values()) for name, part in parts.items()}
