"""Monitoring of training: perplexity on some held-out text and a few examples by generation while a stage trains, and
the rules that end a run.

A loss can fall while what the student writes gets worse.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from transformers import PreTrainedModel

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.fields import Checked, Range, Text, checked, shown
from convert.data.batches import Batch
from convert.data.prompts import has_chat_template
from convert.evaluation.perplexity import perplexity
from convert.evaluation.scoring import Answer, by_generation, fitting
from convert.evaluation.statistics import gap
from convert.evaluation.tasks import TASKS, Item, Task
from convert.models.loading import Teacher

MONITORED = ("names", "indentation", "copying", "sums", "forms")  # tasks with short answers (ours)
EXAMPLES = 8  # of each task
SEED = 1  # other examples than at the end of a run
SHOWN = 2  # examples of each task in the table of generations


@dataclass(frozen=True)
class Rule(Checked):
    """A rule such as `generation<0.2`: the run stops when it holds at a measurement."""

    text: Text
    name: Literal["perplexity", "generation", "generation_gap"]
    sign: Literal["<", ">"]
    bound: Annotated[float, Range(-1e9, 1e9)]

    @staticmethod
    @checked
    def of(text: str) -> "Rule":
        """Read a rule; UserError where it is none."""
        found = re.fullmatch(
            r"\s*(perplexity|generation|generation_gap)\s*([<>])\s*(-?[0-9]{0,9}\.?[0-9]{1,9})\s*", text
        )
        if not found:
            raise UserError(
                "--stop-when takes perplexity, generation or generation_gap, < or >, and a number, as generation<0.2;"
                f" got {shown(text)}."
            )
        name, sign, bound = cast(tuple[Any, Any, str], found.groups())
        return Rule(text, name, sign, float(bound))

    def holds(self, numbers: dict[str, float]) -> bool:
        """Whether the rule holds for these measurements; it does not where its number was not measured."""
        value = numbers.get(f"held_out/{self.name}")
        if value is None:  # no example fits this model
            return False
        return value < self.bound if self.sign == "<" else value > self.bound


class Monitor:
    """Measures the student that it is called with, and returns numbers to log. The examples and the teacher's answers
    are the same each time. `generations` holds the texts of the last call, `stopped_by` the rule that held."""

    def __init__(self, teacher: Teacher, batches: list[Batch], rules: Sequence[Rule] = ()) -> None:
        self.teacher, self.batches, self.rules = teacher, batches, rules
        self.teacher_answers: dict[Task, tuple[list[Item], list[Answer]]] | None = None
        self.generations: list[dict[str, str]] = []
        self.stopped_by: Rule | None = None

    def __call__(self, student: PreTrainedModel) -> dict[str, float]:
        """Perplexity on the held-out batches, and the share of correct answers by generation with its gap to the
        teacher's, both means of the tasks."""
        student.eval()
        if self.teacher_answers is None:
            self.teacher_answers = {
                task: (items, self._answers(self.teacher.model, task, items)) for task, items in self._examples()
            }
        numbers, self.generations = {"held_out/perplexity": perplexity(student, self.batches)}, []
        shares, gaps = [], []
        for task, (items, theirs) in self.teacher_answers.items():
            answers = self._answers(student, task, items)
            shares.append(sum(answer.correct for answer in answers) / len(items))
            gaps.append(gap(items, theirs, answers)["gap"])
            self.generations += [
                {
                    "task": task.name,
                    "prompt": items[i].prompt,
                    "teacher": theirs[i].text,
                    "student": answers[i].text,
                    "reference": items[i].answer,
                }
                for i in range(min(SHOWN, len(items)))
            ]
        if shares:
            numbers |= {
                "held_out/generation": sum(shares) / len(shares),
                "held_out/generation_gap": sum(gaps) / len(gaps),
            }
        self.stopped_by = next((rule for rule in self.rules if rule.holds(numbers)), None)
        if self.stopped_by:
            console.print(f"The run stops here, by --stop-when {self.stopped_by.text}.", style="yellow")
        return numbers

    def _examples(self) -> list[tuple[Task, list[Item]]]:
        """The items of each task that fit into the model's positions."""
        found = []
        for task in (TASKS[name] for name in MONITORED):
            if task.chat and not has_chat_template(self.teacher.tokenizer):
                continue
            items = task.items(EXAMPLES, SEED)
            if places := fitting(self.teacher.model, self.teacher.tokenizer, task, items):
                found.append((task, [items[i] for i in places]))
        return found

    def _answers(self, model: PreTrainedModel, task: Task, items: list[Item]) -> list[Answer]:
        """Answers by generation, in the order of the items."""
        answers = (a for batch in by_generation(model, self.teacher.tokenizer, task, items) for a in batch)
        return sorted(answers, key=lambda answer: answer.item)
