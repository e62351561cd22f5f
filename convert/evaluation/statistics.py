"""Statistics of answers: scores with their intervals, gaps between two models on the same examples, and what a score
hides."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.evaluation.scoring import Answer
from convert.evaluation.tasks import LETTERS, Item

RESAMPLES = 2000
CONFIDENCE = 0.95


def per_example(items: Sequence[Item], answers: Sequence[Answer]) -> dict[int, float]:
    """Example -> the share of its items, or of their parts, that are answered correctly."""
    scores: dict[int, list[float]] = {}
    for answer in sorted(answers, key=lambda a: a.item):
        scores.setdefault(items[answer.item].example, []).append(answer.score)
    return {example: sum(found) / len(found) for example, found in scores.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval (95 %) of the mean: percentiles over 2,000 resamples of the examples, always the same."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, dtype=float)[draws].mean(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _row(values: Sequence[float]) -> dict[str, Any]:
    low, high = interval(values)
    return {"score": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def score(items: Sequence[Item], answers: Sequence[Answer], *, lettered: bool = False) -> dict[str, Any]:
    """Score of a model on a task, as the fields of convert.runs.evaluation_schemas.Score that follow from its answers.
    `lettered`: the answers are letters."""
    row = _row(list(per_example(items, answers).values()))
    row["unparsable"] = sum(a.prediction is None for a in answers) / len(answers)
    if any(a.tokens for a in answers):
        row |= writing([a.tokens for a in answers])
    return row | letters(items, answers) if lettered else row


def gap(items: Sequence[Item], teacher: Sequence[Answer], student: Sequence[Answer]) -> dict[str, Any]:
    """Score of the teacher minus score of the student: `gap`, `low`, `high`, `n`. It is paired, as both answered the
    same examples."""
    t, s = per_example(items, teacher), per_example(items, student)
    row = _row([t[example] - s[example] for example in t])
    return {"gap" if key == "score" else key: value for key, value in row.items()}


def letters(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Any]:
    """Which letters are predicted, and whether they follow the label or the content, by four orders of the same
    options: `stickiness` is 0 where each letter is predicted once, 1 where it is always the same one (the probe of
    arXiv 2608.02689)."""
    counts = Counter(a.prediction for a in answers)
    predicted: dict[int, list[str | None]] = {}
    for answer in answers:
        predicted.setdefault(items[answer.item].example, []).append(answer.prediction)
    most = [
        max(Counter(letter for letter in found if letter is not None).values(), default=0) / len(found)
        for found in predicted.values()
    ]
    return {
        "letters": {letter: counts[letter] / len(answers) for letter in LETTERS},
        "stickiness": max(0.0, (sum(most) / len(most) - 1 / 4) / (1 - 1 / 4)),
    }


def writing(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Repetition and diversity of texts in tokens: the share of 3-grams that are not new in their text, and of 2-grams
    that are different in all texts together."""
    repeated = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _grams(text, 3))]
    pairs = [gram for text in texts for gram in _grams(text, 2)]
    return {
        "repetition": sum(repeated) / len(repeated) if repeated else 0.0,
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 1.0,
    }


def _grams(text: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def divergence(teacher: Sequence[Answer], student: Sequence[Answer]) -> dict[str, float | None]:
    """How much of the teacher's greedy text the student writes too: the share of equal texts, and the median number of
    tokens before the first that differs, of the others (None: there are no others)."""
    mine = {a.item: a for a in student}
    lengths = [_common(a.tokens, mine[a.item].tokens) for a in teacher if a.text != mine[a.item].text]
    return {
        "same_text": 1 - len(lengths) / len(teacher),
        "first_divergence": float(np.median(lengths)) if lengths else None,
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
