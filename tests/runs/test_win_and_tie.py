"""The win-and-tie rate on scores that can be counted by hand."""

import pytest

from convert.runs.evaluation_schemas import Evaluation, Gap, Score
from convert.runs.win_and_tie import needed_tolerances, win_and_tie


def found(*tasks: tuple[float, float, float, float]) -> Evaluation:
    """An evaluation of tasks (teacher's score, gap, its low and high end), by both scoring methods alike."""
    scorings = ("generation", "likelihood")
    rows, gaps = [], []
    for number, (score, gap, low, high) in enumerate(tasks):
        for scoring in scorings:
            same = {"task": f"t{number}", "scoring": scoring, "n": 16}
            gaps.append(Gap(gap=gap, low=low, high=high, **same))
            for model, value in (("teacher", score), ("student", score - gap)):
                rows.append(Score(model=model, score=value, low=value, high=value, unparsable=0.0, **same))
    return Evaluation(rows=rows, gaps=gaps, models={})


def test_a_tolerance_is_a_share_of_the_teachers_score():
    """The third student loses as many points as the second, of a higher score."""
    tasks = found((0.5, -0.1, -0.2, 0.0), (0.5, 0.1, 0.0, 0.15), (0.9, 0.1, 0.05, 0.15), (0.4, 0.4, 0.3, 0.4))
    assert [each.value for each in needed_tolerances(tasks, "generation")] == pytest.approx([0, 0.2, 1 / 9, 1])
    rates = {tolerance: win_and_tie(tasks, "generation", tolerance).rate for tolerance in (0, 0.1, 0.12, 0.2, 1)}
    assert rates == {0: 0.25, 0.1: 0.25, 0.12: 0.5, 0.2: 0.75, 1: 1}
    assert win_and_tie(tasks, "generation").critical == pytest.approx(1 / 9)  # half of the four tasks


def test_what_the_intervals_leave_open_is_between_low_and_high():
    """The first is won whatever the sample, the second lost; the third may be either."""
    row = win_and_tie(found((0.5, 0.0, -0.1, 0.04), (0.5, 0.3, 0.2, 0.4), (0.5, 0.1, -0.1, 0.3)), "likelihood")
    assert (row.low, row.rate, row.high) == pytest.approx((1 / 3, 1 / 3, 2 / 3)) and row.tasks == 3


def test_a_loss_at_the_tolerance_is_a_tie_whatever_the_rounding():
    assert win_and_tie(found((0.3, 0.3 * 0.1, 0.0, 0.1)), "generation", 0.1).rate == 1


def test_where_the_teacher_knows_nothing_there_is_nothing_to_tie():
    assert win_and_tie(found((0.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.4, 0.5)), "generation").tasks == 1
    assert win_and_tie(found((0.0, 0.0, 0.0, 0.0)), "generation") is None
    assert win_and_tie(found(), "generation") is None
