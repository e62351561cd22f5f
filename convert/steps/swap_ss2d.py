"""The step SwapSS2D: replace the attention of the run's teacher, a vision transformer, by SS2D."""

from dataclasses import dataclass
from typing import Annotated, Any

from transformers import PreTrainedModel

from convert.core.fields import Checked, Name, Range
from convert.models.vision.vit_ss2d import ViTSS2DConfig
from convert.models.vision.vit_ss2d_start import ss2d_config, without_attention
from convert.steps.from_teacher import FromTeacher


@dataclass(frozen=True)
class SwapSS2D(FromTeacher, Checked):
    """Make a student that has an SS2D block of the same width in place of each attention, with random weights, and is
    the teacher in everything else. The fields are those of VMamba's configuration."""

    name: Name
    state_size: Annotated[int, Range(1, 256)] = 8
    ssm_ratio: Annotated[float, Range(0.1, 8)] = 1.0
    time_step_rank: Annotated[int, Range(1, 4096)] | None = None

    def config(self, teacher: Any) -> ViTSS2DConfig:
        return ss2d_config(teacher, self.state_size, self.ssm_ratio, self.time_step_rank)

    def what(self, config: ViTSS2DConfig) -> str:
        inner = int(self.ssm_ratio * config.hidden_size)
        return f"swap in ss2d: {config.num_hidden_layers} layers, inner width {inner}, {self.state_size} states"

    def started(self, student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
        """Keep all but attention."""
        return without_attention(student, teacher)
