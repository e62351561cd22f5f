"""Terms that compare layers of different widths, through projections that are learnt and then dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convert.objectives.features import cosine_distance
from convert.objectives.terms import LayerTerm


def matched_layers(student_depth: int, teacher_depth: int) -> list[int]:
    """Return for each student layer the index of the teacher layer at the same share of the depth; the last match.

    TinyBERT's uniform strategy (arXiv 1909.10351: every third of 12 layers for a student of 4), rounded up where the
    depths do not divide."""
    return [-(-(layer + 1) * teacher_depth // student_depth) - 1 for layer in range(student_depth)]


@dataclass(frozen=True)
class HiddenProjection(LayerTerm):
    """The cosine distance between a linear projection of each student layer's output and the matched teacher layer's
    output, the mean over student layers.

    The projection has no bias and goes from the student's width to the teacher's: TinyBERT's (arXiv 1909.10351), here
    one for each pair of layers. The states are normalised, so that a few large channels cannot dominate: Patient KD's
    (arXiv 1908.09355), whose squared error of unit vectors is twice the cosine distance."""

    def build(self, student: nn.Module, teacher: nn.Module | None) -> nn.Module | None:
        if teacher is None:
            return None
        parameter = next(student.parameters())
        projections = [
            nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False, device=parameter.device)
            for _ in range(student.config.num_hidden_layers)
        ]
        return nn.ModuleList(projections)

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], owned: Any) -> Tensor:
        matched = matched_layers(len(student), len(teacher))
        distances = [
            cosine_distance(project(output).float(), teacher[layer])
            for project, output, layer in zip(owned, student, matched, strict=True)
        ]
        return torch.stack(distances).mean()
