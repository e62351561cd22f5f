"""Monitoring of training: perplexity on some held-out text and a few examples by generation while a stage trains.

A loss can fall while what the student writes gets worse.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.data.prompts import has_chat_template
from convert.evaluation.perplexity import perplexity
from convert.evaluation.rules import Rule, first_that_holds
from convert.evaluation.scoring import Answer, by_generation, fitting
from convert.evaluation.statistics import gap
from convert.evaluation.tasks import TASKS, Item, Task
from convert.models.loading import Teacher

MONITORED = ("names", "indentation", "copying", "sums", "forms")  # tasks with short answers (ours)
EXAMPLES = 8  # of each task
SEED = 1  # other examples than at the end of a run
METRICS = ("perplexity", "generation", "generation_gap")  # that a rule may ask for
SHOWN = 2  # examples of each task in the table of generations


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
        theirs_by_task = self.ask_teacher()
        numbers, self.generations = {"held_out/perplexity": perplexity(student, self.batches)}, []
        shares, gaps = [], []
        for task, (items, theirs) in theirs_by_task.items():
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
        self.stopped_by = first_that_holds(self.rules, numbers)
        return numbers

    def ask_teacher(self) -> dict[Task, tuple[list[Item], list[Answer]]]:
        """The examples with the teacher's answers, which it is asked once."""
        if self.teacher_answers is None:
            self.teacher_answers = {
                task: (items, self._answers(self.teacher.model, task, items)) for task, items in self._examples()
            }
        return self.teacher_answers

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
