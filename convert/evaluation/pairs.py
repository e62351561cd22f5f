"""Students of one teacher compared on the same examples: what each answered, and intervals of their differences.

S seeds · N examples of a task
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.core.errors import UserError
from convert.evaluation.runner import Answers, chosen, items_of, key_of, parsed_again
from convert.evaluation.statistics import CONFIDENCE, RESAMPLES, per_example
from convert.evaluation.tasks import Item, Task
from convert.models.loading import Teacher
from convert.runs.evaluation_schemas import Evaluation, tasks_of
from convert.runs.keys import SCORINGS, Scoring

Correct = dict[Scoring, dict[str, dict[int, float]]]  # task -> example -> share of its items answered correctly


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval is on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)

    def __neg__(self) -> "Interval":
        return Interval(-self.mean, -self.high, -self.low)


class Examples:
    """The examples that students of one teacher are compared on, `limit` of each task; each task's are made once."""

    def __init__(self, teacher: Teacher, limit: int) -> None:
        self.teacher, self.limit = teacher, limit
        self._items: dict[tuple[str, int], tuple[Task, list[Item]]] = {}

    def answered(self, run: Path, found: Evaluation) -> Correct:
        """What the student of a finished run answered, example by example, in the evaluation `found` that the run ended
        with. Nothing is generated again: the answers are read from the run's folder. Raises UserError where one is
        missing."""
        answers, correct = Answers(run / "answers.jsonl"), Correct()
        for name in tasks_of(found.rows):
            task, items = self._of(name, found.seed)
            for scoring in SCORINGS:
                known = answers.of(key_of(found.models["student"], self.teacher.tokenizer, task, items, scoring))
                if set(known) != set(range(len(items))):
                    raise UserError(
                        f"{run / 'answers.jsonl'} must have an answer to each of the {len(items)} prompts of {name} by"
                        f" {scoring}; it has {len(known)}. Give the number of examples that the run was made with, or"
                        " make it again in another folder."
                    )
                read = [parsed_again(task, items, scoring, a) for a in known.values()]
                correct.setdefault(scoring, {})[name] = per_example(items, read)
        return correct

    def _of(self, name: str, seed: int) -> tuple[Task, list[Item]]:
        if (name, seed) not in self._items:
            (task,) = chosen(name, self.teacher.tokenizer)
            items = items_of({"teacher": self.teacher.model}, self.teacher.tokenizer, task, self.limit, seed)
            self._items[name, seed] = task, items
        return self._items[name, seed]


def table_of(seeds: Sequence[Correct], scoring: Scoring, tasks: Sequence[str]) -> dict[str, NDArray]:
    """Task -> scores [S, N] by one scoring method, examples in one order. Every seed must have the same examples."""
    return {
        task: np.array([[one[scoring][task][e] for e in sorted(one[scoring][task])] for one in seeds]) for task in tasks
    }


def interval_of(tasks: Mapping[str, NDArray]) -> Interval:
    """Mean over tasks of scores, or of differences of scores, [S, N] each, and its bootstrap interval: percentiles over
    2,000 resamples of the seeds, the same in all tasks, and of each task's examples, the same in all seeds.

    Few seeds vary less about their own mean than about the true one: their deviations from it are stretched by
    sqrt(S / (S - 1)). Of a single seed, the interval knows the examples alone."""
    rng = np.random.default_rng(0)
    num_seeds = len(next(iter(tasks.values())))
    drawn = rng.integers(num_seeds, size=(RESAMPLES, num_seeds))
    stretch = np.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 1.0
    totals = np.zeros(RESAMPLES)
    for scores in tasks.values():
        center = scores.mean(0)
        by_example = (center + stretch * (scores - center))[drawn].mean(1)  # [resamples, N]
        examples = rng.integers(scores.shape[1], size=by_example.shape)
        totals += np.take_along_axis(by_example, examples, 1).mean(1)
    low, high = np.quantile(totals / len(tasks), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    mean = float(np.mean([scores.mean() for scores in tasks.values()]))
    return Interval(mean, float(low), float(high))


def difference(a: Mapping[str, NDArray], b: Mapping[str, NDArray]) -> Interval:
    """Scores a minus scores b, paired by seed and example."""
    return interval_of({task: a[task] - b[task] for task in a})
