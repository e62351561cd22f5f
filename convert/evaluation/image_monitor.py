"""Monitoring of the training of image classifiers: top-1 error on held-out images."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from convert.data.image_batch import ImageBatch
from convert.evaluation.classification import error
from convert.evaluation.rules import Rule, first_that_holds

METRICS = ("error",)  # that a rule may ask for


class ErrorMonitor:
    """Measures the student that it is called with, and returns numbers to log. Nothing is written, so `generations`
    stays empty; `stopped_by` is the rule that held."""

    def __init__(self, batches: Sequence[ImageBatch], rules: Sequence[Rule] = ()) -> None:
        self.batches, self.rules = batches, rules
        self.generations: list[dict] = []
        self.stopped_by: Rule | None = None

    def ask_teacher(self) -> None:
        """The teacher is asked nothing."""

    def __call__(self, student: PreTrainedModel) -> dict[str, float]:
        """Top-1 error on the held-out images, in percent."""
        numbers = {"held_out/error": error(student.eval(), self.batches)}
        self.stopped_by = first_that_holds(self.rules, numbers)
        return numbers
