"""What steps share that make an image classifier from the weights of the run's teacher."""

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.steps.base import Outline, PlanContext, Session, Step, StepPlan, count


class FromTeacher(Step):
    """A step that makes a student from the teacher's weights; how, a subclass says."""

    @abstractmethod
    def config(self, teacher: Any) -> PreTrainedConfig:
        """The student's configuration. Raises UserError for a teacher that it cannot start from."""

    @abstractmethod
    def what(self, config: Any) -> str:
        """The step in a few words, for a student of this configuration."""

    @abstractmethod
    def started(self, student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
        """Give a new student of that configuration the teacher's weights."""

    def problems(self, before: Outline) -> list[str]:
        if before.is_student:
            return [f"Step {self.name}: it makes a student, and a step before it has made one. Let it be the first."]
        try:
            self.config(before.teacher)
        except UserError as error:
            return [f"Step {self.name}: {error}"]
        return []

    def after(self, before: Outline) -> Outline:
        host = before.host if self.problems(before) else self.config(before.teacher)
        return dataclasses.replace(before, host=host, is_student=True, is_measured=False)

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        config = self.config(context.config)
        with torch.device("meta"):
            student = context.domain.empty_model(config)
        return student, StepPlan(self.name, self.what(config), 0, 0, count(student), 0, 0.0)

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Make the student; the run has seeded the generator for what is drawn."""
        teacher = session.teacher.model
        with torch.device(teacher.device):
            made = session.domain.empty_model(self.config(teacher.config))
        made = self.started(made, teacher).requires_grad_(False).eval()
        session.domain.keep_start(made, session.teacher, session.held_out, session.folder.run)
        return made, {}
