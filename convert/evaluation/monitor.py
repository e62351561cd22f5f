"""What is measured while a stage trains: some held-out text, and a few questions by generation; and the rules that end
a run.

A loss can fall while the writing rots.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.fields import Range, Text, check, checked, shown
from convert.data.batches import Batch
from convert.data.prompts import has_chat_template
from convert.evaluation import perplexity as measure
from convert.evaluation import statistics as scores
from convert.evaluation.scoring import Answer, by_generation, fits
from convert.evaluation.tasks import TASKS, Item, Task
from convert.models.loading import Teacher

WATCHED = ("names", "indentation", "copying", "sums", "forms")  # quick to write (ours)
QUESTIONS = 8  # of each
SHOWN = 2  # of each, in the table of generations


@dataclass(frozen=True)
class Rule:
    """`generation<0.2`: the run stops when this holds at a measurement."""

    text: Text
    name: Literal["perplexity", "generation", "generation_gap"]
    sign: Literal["<", ">"]
    bound: Annotated[float, Range(-1e9, 1e9)]

    __post_init__ = check

    @staticmethod
    @checked
    def of(text: str) -> "Rule":
        found = re.fullmatch(
            r"\s*(perplexity|generation|generation_gap)\s*([<>])\s*(-?[0-9]{0,9}\.?[0-9]{1,9})\s*", text
        )
        if not found:
            raise UserError(
                "--stop-when takes perplexity, generation or generation_gap, < or >, and a number, as generation<0.2;"
                f" got {shown(text)}."
            )
        return Rule(text, found[1], found[2], float(found[3]))

    def holds(self, numbers: dict[str, float]) -> bool:
        value = numbers.get(f"held_out/{self.name}")
        if value is None:  # no question fits this model
            return False
        return value < self.bound if self.sign == "<" else value > self.bound


class Watch:
    """Called with the student: numbers to log. The questions and the teacher's answers are the same each time;
    `generations` holds the texts of the last call."""

    def __init__(self, taught: Teacher, batches: list[Batch], rules: Sequence[Rule] = ()):
        self.taught, self.batches, self.rules = taught, batches, rules
        self.teachers: dict[Task, tuple[list[Item], list[Answer]]] | None = None
        self.generations: list[dict] = []
        self.stopped_by: Rule | None = None

    def __call__(self, student) -> dict[str, float]:
        student.eval()
        if self.teachers is None:
            self.teachers = {
                task: (items, self._answers(self.taught.model, task, items)) for task, items in self._questions()
            }
        numbers, self.generations = {"held_out/perplexity": measure.perplexity(student, self.batches)}, []
        shares, gaps = [], []
        for task, (items, teachers) in self.teachers.items():
            answers = self._answers(student, task, items)
            shares.append(sum(a.right for a in answers) / len(items))
            gaps.append(scores.gap(items, teachers, answers)["gap"])
            self.generations += [
                {
                    "task": task.name,
                    "prompt": items[i].prompt,
                    "teacher": teachers[i].text,
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

    def _questions(self) -> list[tuple[Task, list[Item]]]:
        asked = []
        for task in (TASKS[name] for name in WATCHED):
            if task.chat and not has_chat_template(self.taught.tokenizer):
                continue
            items = task.items(QUESTIONS, 1)  # other questions than at the end
            if room := fits(self.taught.model, self.taught.tokenizer, task, items):
                asked.append((task, [items[i] for i in room]))
        return asked

    def _answers(self, model, task: Task, items: list[Item]) -> list[Answer]:
        return sorted(
            (a for batch in by_generation(model, self.taught.tokenizer, task, items) for a in batch),
            key=lambda a: a.item,
        )
