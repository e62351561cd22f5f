"""Terms that compare how predictions are related, instead of their values.

N images or tokens · K classes or vocabulary
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Range
from convert.objectives.terms import LogitTerm


def pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """The correlation of two tensors of one shape along a dimension; 0 where one of them is constant."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)


def correlation_loss(
    student_NK: Tensor, teacher_NK: Tensor, between: float, within: float, temperature: float
) -> Tensor:
    """T^2 times `between` times one minus the correlation of the softened distributions between the classes, and
    `within` times one minus the mean over classes of that over the N, which is the same for all of them: [N]."""
    q, p = (F.softmax(z / temperature, -1) for z in (student_NK, teacher_NK))
    return temperature**2 * (between * (1 - pearson(q, p, -1)) + within * (1 - pearson(q, p, 0).mean()))


@dataclass(frozen=True)
class DIST(LogitTerm):
    """One minus the correlation of student and teacher between the classes of each image, plus one minus that within
    each class over the images (DIST, arXiv 2205.10536). All are correlations of softened probabilities, times T^2.

    Weights and temperature are the defaults of the official code (hunto/DIST_KD), which are those of OFA-KD's baseline,
    too. The images of the second part are those of one call: a micro-batch, or a chunk of tokens."""

    between_classes: Annotated[float, Range(0, 1e6)] = 1.0  # its beta
    within_classes: Annotated[float, Range(0, 1e6)] = 1.0  # its gamma
    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return correlation_loss(student, teacher, self.between_classes, self.within_classes, self.temperature)
