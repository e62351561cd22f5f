"""Intervals of students that are compared on the same examples, and what a finished run answered."""

import shutil

import numpy as np
import pytest

from convert import load_teacher
from convert.core.errors import UserError
from convert.evaluation.pairs import Examples, Interval, difference, interval_of
from convert.runs import records


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def width(found: Interval) -> float:
    return found.high - found.low


def test_an_interval_of_one_seed_is_that_of_the_examples():
    scores = noise(1, 400)
    found = interval_of({"a": scores})
    assert found.mean == pytest.approx(scores.mean()) and found.low < found.mean < found.high
    assert width(found) == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)


def test_seeds_that_differ_widen_it_as_their_standard_error_does():
    """Examples alike, so that the seeds alone vary; the unbiased standard deviation, however few they are."""
    for num_seeds in (3, 12):
        scores = noise(num_seeds, 1) + np.zeros((num_seeds, 50))
        expected = 2 * 1.96 * scores[:, 0].std(ddof=1) / np.sqrt(num_seeds)
        assert width(interval_of({"a": scores})) == pytest.approx(expected, rel=0.25)
    assert width(interval_of({"a": np.ones((3, 50))})) == 0


def test_tasks_count_once_however_many_examples_they_have():
    found = interval_of({"a": np.ones((2, 10)), "b": np.zeros((2, 1000))})
    assert found == Interval(0.5, 0.5, 0.5)


def test_seeds_are_drawn_for_all_tasks_at_once():
    """A seed that is good in one task and as bad in the other changes nothing in the mean."""
    seeds = noise(6, 1) + np.zeros((6, 20))
    assert width(interval_of({"a": seeds, "b": -seeds})) < 1e-12 < width(interval_of({"a": seeds, "b": seeds}))


def test_differences_are_paired():
    easy = noise(3, 60)  # what makes an example easy for both
    a, b = easy + 0.1 + 0.01 * noise(3, 60, seed=1), easy
    assert difference({"t": a}, {"t": b}).sign == 1 and difference({"t": b}, {"t": a}).sign == -1
    assert interval_of({"t": a}).sign == 0
    assert difference({"t": a}, {"t": a}) == Interval(0, 0, 0)
    assert -Interval(1, 0.5, 2) == Interval(-1, -2, -0.5)


def test_what_a_finished_run_answered_gives_its_scores(finished_run, tmp_path):
    teacher, found = load_teacher("neox-nano"), records.report(finished_run).evaluation
    correct = Examples(teacher, 2).answered(finished_run, found)
    for row in found.rows:
        if row.model == "student":
            assert np.mean(list(correct[row.scoring][row.task].values())) == pytest.approx(row.score)
    with pytest.raises(
        UserError, match="must have an answer to each of the 3 prompts of .*; it has 0. Give the number"
    ):
        Examples(teacher, 3).answered(finished_run, found)
    shutil.copy(finished_run / "answers.jsonl", tmp_path)
    with open(tmp_path / "answers.jsonl", "r+b") as file:
        file.truncate(file.seek(0, 2) - 20)
    with pytest.raises(UserError, match="must have an answer to each of the 2 prompts"):
        Examples(teacher, 2).answered(tmp_path, found)
