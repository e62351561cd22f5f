"""Intervals, gaps, letters and repetition, on numbers that can be checked by hand."""

import numpy as np
import pytest

from convert.evaluation import statistics
from convert.evaluation.scoring import Answer
from convert.evaluation.tasks import Item

ITEMS = [Item(i, f"p{i}", "A", tuple("ABCD"), 0) for i in range(40)]


def answers(rights):
    return [Answer(i, bool(right), "A" if right else None) for i, right in enumerate(rights)]


def test_the_interval_covers_the_binomial_one():
    low, high = statistics.interval([1] * 20 + [0] * 20)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 40**0.5, abs=0.02) and high == pytest.approx(
        0.5 + 1.96 * 0.5 / 40**0.5, abs=0.02
    )
    assert statistics.interval([1.0] * 9) == (1, 1)


def test_gaps_are_paired():
    """Two models that fail on the same examples have a gap of exactly nothing; unpaired, its interval would be
    wide."""
    rights = np.arange(40) % 2
    same = statistics.gap(ITEMS, answers(rights), answers(rights))
    assert (same["gap"], same["low"], same["high"], same["n"]) == (0, 0, 0, 40)
    other = statistics.gap(ITEMS, answers(rights), answers(1 - rights))
    assert other["gap"] == 0 and other["low"] < -0.2 < 0.2 < other["high"]


def test_the_order_of_the_answers_does_not_matter():
    found = answers(np.arange(40) % 3 == 0)
    assert statistics.score(ITEMS, found) == statistics.score(ITEMS, found[::-1])


def test_examples_count_once_however_many_items_they_have():
    items = [Item(i // 4, f"p{i}", "A", tuple("ABCD"), 0) for i in range(8)]
    row = statistics.score(items, answers([1, 1, 1, 1, 0, 0, 0, 0]))
    assert (row["n"], row["score"], row["unparsable"]) == (2, 0.5, 0.5)


def test_stickiness_is_between_content_and_label():
    items = [Item(i // 4, f"p{i}", "A", tuple("ABCD"), 0) for i in range(8)]
    predicted = lambda letters: [Answer(i, False, s) for i, s in enumerate(letters)]  # noqa: E731
    assert statistics.letters(items, predicted("ABCDDCBA"))["stickiness"] == 0
    assert statistics.letters(items, predicted("AAAAAAAA"))["stickiness"] == 1
    half = statistics.letters(items, predicted("AAAABCDA"))
    assert half["stickiness"] == pytest.approx(0.5) and half["letters"] == {
        "A": 5 / 8,
        "B": 1 / 8,
        "C": 1 / 8,
        "D": 1 / 8,
    }
    assert statistics.letters(items, predicted([None] * 8))["stickiness"] == 0


def test_repetition_and_distinctness():
    assert statistics.writing([(1, 2, 3, 4, 5)]) == {"repetition": 0.0, "distinct_2": 1.0}
    assert statistics.writing([(1,) * 12])["repetition"] == pytest.approx(0.9)
    assert statistics.writing([(1, 2, 3), (1, 2, 3)])["distinct_2"] == 0.5
    assert statistics.writing([(), (1,)]) == {"repetition": 0.0, "distinct_2": 1.0}


def test_the_first_divergence_is_counted_in_tokens():
    teacher = [
        Answer(i, True, "x", text, ids)
        for i, (text, ids) in enumerate([("abc", (1, 2, 3)), ("abc", (1, 2, 3)), ("g", (7,))])
    ]
    # g, and a stop
    student = [
        Answer(2, True, "x", "g", (7, 8)),
        Answer(0, True, "x", "ai", (1, 9)),
        Answer(1, True, "x", "abcd", (1, 2, 3, 4)),
    ]
    found = statistics.divergence(teacher, student)
    assert found == {"same_text": pytest.approx(1 / 3), "first_divergence": 2.0}
