"""The win-and-tie rate: on which share of the tasks a student is as good as its teacher, up to a tolerance (Effective
Distillation to Hybrid xLSTM, arXiv 2603.15590, appendix A).

It is computed from the scores and gaps of an evaluation wherever it is shown, so every evaluation.json has it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convert.runs.evaluation_schemas import ROUNDING, Evaluation
from convert.runs.keys import Scoring

TOLERANCE = 0.1  # of the headline (ours): the student keeps nine tenths of the teacher's score


@dataclass(frozen=True)
class Needed:
    """The least tolerance at which a task counts as won or tied: the share of the teacher's score that is lost, 0 where
    nothing is.

    `low` and `high` are the same at the ends of the gap's paired 95 % bootstrap interval, within 0 .. 1."""

    task: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WinAndTie:
    """C_alpha: the share of the tasks on which student >= (1 - alpha) teacher.

    `low` counts the tasks that are within the tolerance over their whole interval, `high` those that reach into it:
    what lies between is sampling noise. `critical` is alpha*, the least tolerance with a rate of one half or more."""

    tolerance: float
    rate: float
    low: float
    high: float
    tasks: int
    critical: float


def needed_tolerances(found: Evaluation, scoring: Scoring) -> list[Needed]:
    """What each task needs by this scoring method. Tasks of which the teacher has nothing correct are left out: there
    every student ties."""
    needed = []
    for gap in found.gaps:
        if gap.scoring == scoring and (score := found.row(gap.task, "teacher", scoring).score) > 0:
            value, low, high = (min(1.0, max(0.0, lost / score)) for lost in (gap.gap, gap.low, gap.high))
            needed.append(Needed(gap.task, value, low, high))
    return needed


def rate(needed: Sequence[float], tolerance: float) -> float:
    """The share of these tolerances that are at most `tolerance`."""
    return sum(value <= tolerance + ROUNDING for value in needed) / len(needed)


def win_and_tie(found: Evaluation, scoring: Scoring, tolerance: float = TOLERANCE) -> WinAndTie | None:
    """The win-and-tie rate by this scoring method; None where no task can be compared."""
    needed = needed_tolerances(found, scoring)
    if not needed:
        return None
    values = sorted(each.value for each in needed)
    return WinAndTie(
        tolerance=tolerance,
        rate=rate(values, tolerance),
        low=rate([each.high for each in needed], tolerance),
        high=rate([each.low for each in needed], tolerance),
        tasks=len(needed),
        critical=values[math.ceil(len(values) / 2) - 1],
    )
