"""The step Factorise: make a VMamba of low rank from the weights of the run's teacher, a VMamba."""

from dataclasses import dataclass
from typing import Annotated, Any

from transformers import PreTrainedModel

from convert.core.fields import Checked, Name, Range
from convert.models.vision.vmamba import VMambaConfig
from convert.models.vision.vmamba_lowrank import low_rank_config, start_from
from convert.steps.from_teacher import FromTeacher


@dataclass(frozen=True)
class Factorise(FromTeacher, Checked):
    """Make a student of the teacher's sizes. `ratio`: the share of the numbers of its matrices that their two factors
    have, 1 for whole matrices; `rank`: of its transitions, None for that of the ratio, all of it at 1."""

    name: Name
    ratio: Annotated[float, Range(0.01, 1)] = 0.5  # the smallest of DLRMamba (arXiv 2603.06920)
    rank: Annotated[int, Range(1, 4096)] | None = None

    def config(self, teacher: Any) -> VMambaConfig:
        return low_rank_config(teacher, self.ratio, self.rank)

    def what(self, config: VMambaConfig) -> str:
        rank, N = config.rank_of_transition, config.state_size
        return f"factorise: {self.ratio:.0%} of each matrix, transitions of rank {rank} of {N}"

    def started(self, student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
        """Take the teacher's weights apart."""
        return start_from(student, teacher)
