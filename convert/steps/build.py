"""The step Build: make a student from a configuration, with random weights, instead of swapping into the teacher."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Name, Text
from convert.steps.base import Outline, PlanContext, Session, Step, StepPlan, count


@dataclass(frozen=True)
class Build(Step, Checked):
    """Make a student of the family `model` (a name that the domain knows) with these sizes, and random weights."""

    name: Name
    model: Text
    options: Any  # the domain's sizes of a student

    def problems(self, before: Outline) -> list[str]:
        if before.is_student:
            return [
                f"Step {self.name}: it makes a student, and a step before it has made one. Build first, or not at all."
            ]
        try:
            before.domain.build_config(self.model, self.options, before.teacher)
        except UserError as error:
            return [f"Step {self.name}: {error}"]
        return []

    def after(self, before: Outline) -> Outline:
        if self.problems(before):
            return dataclasses.replace(before, is_student=True)
        config = before.domain.build_config(self.model, self.options, before.teacher)
        mixers = (None,) * getattr(config, "num_hidden_layers", 0)
        return dataclasses.replace(before, host=config, mixers=mixers, is_student=True, is_measured=False)

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        config = context.domain.build_config(self.model, self.options, context.config)
        with torch.device("meta"):
            student = context.domain.empty_model(config)
        what = f"build {context.domain.describe_student(self.model, self.options, config)}"
        return student, StepPlan(self.name, what, 0, 0, count(student), 0, 0.0)

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Draw the weights, or read those that the student starts from. The run has seeded the generator."""
        built = session.domain.build(self.model, self.options, session.teacher)
        built.requires_grad_(False).eval()
        session.domain.keep_start(built, session.teacher, session.held_out, session.folder.run)
        return built, {}
