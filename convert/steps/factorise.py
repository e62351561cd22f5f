"""The step Factorise: make a VMamba of low rank from the weights of the run's teacher, a VMamba."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Name, Range
from convert.models.vision.vmamba import VMambaConfig
from convert.models.vision.vmamba_lowrank import low_rank_config, start_from
from convert.steps.base import Outline, PlanContext, Session, Step, StepPlan, count


@dataclass(frozen=True)
class Factorise(Step, Checked):
    """Make a student of the teacher's sizes. `ratio`: the share of the numbers of its matrices that their two factors
    have, 1 for whole matrices; `rank`: of its transitions, None for that of the ratio, all of it at 1."""

    name: Name
    ratio: Annotated[float, Range(0.01, 1)] = 0.5  # the smallest of DLRMamba (arXiv 2603.06920)
    rank: Annotated[int, Range(1, 4096)] | None = None

    def problems(self, before: Outline) -> list[str]:
        if before.is_student:
            return [f"Step {self.name}: it makes a student, and a step before it has made one. Let it be the first."]
        try:
            self._config(before.teacher)
        except UserError as error:
            return [f"Step {self.name}: {error}"]
        return []

    def after(self, before: Outline) -> Outline:
        host = before.host if self.problems(before) else self._config(before.teacher)
        return dataclasses.replace(before, host=host, is_student=True, is_measured=False)

    def _config(self, teacher: Any) -> VMambaConfig:
        return low_rank_config(teacher, self.ratio, self.rank)

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        config = self._config(context.config)
        with torch.device("meta"):
            student = context.domain.empty_model(config)
        rank, N = config.rank_of_transition, config.state_size
        what = f"factorise: {self.ratio:.0%} of each matrix, transitions of rank {rank} of {N}"
        return student, StepPlan(self.name, what, 0, 0, count(student), 0, 0.0)

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Take the teacher's weights apart."""
        teacher = session.teacher.model
        with torch.device(teacher.device):
            made = session.domain.empty_model(self._config(teacher.config))
        made = start_from(made, teacher).requires_grad_(False).eval()
        session.domain.keep_start(made, session.teacher, session.held_out, session.folder.run)
        return made, {}
