"""One-for-All distillation (OFA-KD, arXiv 2310.19444): models of any architecture are compared in logits, where a
projector has taken what is the architecture's own out of the student's features.

B images · K classes
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.core.fields import Range
from convert.objectives.stage_projectors import MapProjector, TokenProjector, initialise
from convert.objectives.stages import Features, StagedModel
from convert.objectives.terms import StageTerm

Gamma = Annotated[float, Range(0.1, 10)]
Stages = Annotated[int, Range(1, 1234)] | None  # digits: 24 are stages 2 and 4; None: all


def target_of(targets_BK: Tensor) -> Tensor:
    """The one-hot [B, K] of the most likely class of each row; 0 where the label is not known."""
    one_hot = F.one_hot(targets_BK.argmax(-1), targets_BK.shape[-1])
    return one_hot * (targets_BK.sum(-1, keepdim=True) > 0).to(targets_BK.dtype)


def enhanced_cross_entropy(
    student_BK: Tensor, teacher_BK: Tensor, target_BK: Tensor, gamma: float, temperature: float = 1.0
) -> Tensor:
    """The cross-entropy [B] of the student against the teacher, whose probability p counts as p^gamma, and that of the
    target, which `target_BK` marks with a 1, as (1 + p)^gamma - 1. At gamma = 1 it is the plain soft cross-entropy, and
    a larger one says more of what the teacher is sure of.

    As the official code (Hao840/OFAKD), it has no factor for the temperature."""
    p, log_q = F.softmax(teacher_BK / temperature, -1), F.log_softmax(student_BK / temperature, -1)
    return -(((p + target_BK) ** gamma - target_BK) * log_q).sum(-1)


def chosen_stages(stages: Stages, number: int, name: str) -> list[int]:
    """The indices of chosen stages of so many. Raises UserError for stages that are not there."""
    chosen = list(range(1, number + 1)) if stages is None else [int(digit) for digit in str(stages)]
    if chosen != sorted(set(chosen)) or not 1 <= chosen[0] <= chosen[-1] <= number:
        raise UserError(
            f"{name}: the digits of stages must be stages of the student, first to last, each once; it has {number},"
            f" and stages is {stages}."
        )
    return [stage - 1 for stage in chosen]


@dataclass(frozen=True)
class OneForAll(StageTerm):
    """The enhanced cross-entropy of the student's logits, and of logits that a projector makes of each chosen stage,
    against the teacher's logits. The paper's objective is "cross_entropy + one_for_all": the cross-entropy with the
    labels is a term of its own.

    `gamma` is that of the stages, `last_gamma` that of the student's own logits, `logits_weight` the weight of these.
    The defaults are the official code's (Hao840/OFAKD; all four stages, weights and temperature of 1), which trains
    CIFAR-100 with a gamma of 1; its command for a ResNet-18 of DeiT-T on ImageNet has 1.5 for all. Where labels are
    mixed or smoothed the target is the most likely class, as there; an image without a label has no target, so that it
    counts with p^gamma alone (ours)."""

    gamma: Gamma = 1.0
    last_gamma: Gamma = 1.0
    stages: Stages = None
    logits_weight: Annotated[float, Range(0, 1e6)] = 1.0
    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> nn.Module:
        classes, of_teacher = (each.model.config.num_labels for each in (student, teacher))
        if classes != of_teacher:
            raise UserError(
                f"{self.name} compares logits, so student and teacher must have the same classes; they have {classes}"
                f" and {of_teacher}."
            )
        shapes = student.stages
        width, of_teacher = (each.stages[-1].width_of_features for each in (student, teacher))
        projectors: dict[str, nn.Module] = {}
        with torch.device(next(student.model.parameters()).device):
            for stage in chosen_stages(self.stages, len(shapes), self.name):
                shape, after = shapes[stage], len(shapes) - 1 - stage
                projectors[str(stage)] = (
                    MapProjector(shape, after, max(width, of_teacher), classes)
                    if shape.is_map
                    else TokenProjector(shape, after, width, classes)
                )
        return nn.ModuleDict(projectors).apply(initialise)

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: Any) -> Tensor:
        target = target_of(targets)

        def compared(logits: Tensor, gamma: float) -> Tensor:
            return enhanced_cross_entropy(logits, teacher.logits, target, gamma, self.temperature).mean()

        total = self.logits_weight * compared(student.logits, self.last_gamma)
        for stage, projector in owned.items():
            total = total + compared(projector(student.stages[int(stage)]).to(student.logits.dtype), self.gamma)
        return total
