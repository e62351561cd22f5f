"""Terms that compare distributions over the next token.

N tokens · V vocabulary
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Range
from convert.objectives.base import LogitTerm


def cross_entropy(student_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Nats per token, [N]."""
    return F.cross_entropy(student_NV, targets_N, reduction="none")


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the softened distributions, [N] nats."""
    log_p, log_q = (F.log_softmax(z if temperature == 1 else z / temperature, -1) for z in (teacher_NV, student_NV))
    p = log_p.exp()
    with torch.autocast(p.device.type, enabled=False):  # its dots would be in bfloat16
        # two dots instead of p (log p - log q): no passes over tensors of this size
        return temperature**2 * (torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q))


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher) of the softened distributions, [N] nats."""
    return forward_kl(teacher_NV, student_NV, temperature)


@dataclass(frozen=True)
class CrossEntropy(LogitTerm):
    """The negative log-likelihood of the text's next token."""

    needs_teacher: ClassVar[bool] = False

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return cross_entropy(student, targets)


@dataclass(frozen=True)
class ForwardKL(LogitTerm):
    """KL(teacher || student), both softened by a temperature (Hinton et al., arXiv 1503.02531)."""

    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return forward_kl(student, teacher, self.temperature)


@dataclass(frozen=True)
class ReverseKL(LogitTerm):
    """KL(student || teacher), both softened by a temperature (MiniLLM, arXiv 2306.08543)."""

    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return reverse_kl(student, teacher, self.temperature)
