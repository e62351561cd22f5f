"""Terms that compare a distribution over the next token with a mixture of the teacher's and the student's.

N tokens · V vocabulary
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Range
from convert.objectives.terms import LogitTerm


def log_mixture(log_a_NV: Tensor, log_b_NV: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) of two distributions, [N, V], from their logarithms: no probability underflows on
    the way. `share` is above 0 and below 1."""
    odds = math.log(share) - math.log1p(-share)
    return torch.logaddexp(log_a_NV + odds, log_b_NV).add_(math.log1p(-share))  # in place: its backward needs no output


def skewed_kl(a_NV: Tensor, b_NV: Tensor, alpha: float) -> Tensor:
    """KL(a || alpha a + (1 - alpha) b) of the distributions of two logits, [N] nats; at most -log(alpha)."""
    log_a, log_b = F.log_softmax(a_NV, -1), F.log_softmax(b_NV, -1)
    a, log_mix = log_a.exp(), log_mixture(log_a, log_b, alpha) if alpha else log_b
    with torch.autocast(a.device.type, enabled=False):  # its dots would be in bfloat16
        return torch.linalg.vecdot(a, log_a) - torch.linalg.vecdot(a, log_mix)


def jensen_shannon(student_NV: Tensor, teacher_NV: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, of the teacher's p and the student's q,
    [N] nats; at most the entropy of (beta, 1 - beta)."""
    log_p, log_q = F.log_softmax(teacher_NV, -1), F.log_softmax(student_NV, -1)
    p, q, log_mix = log_p.exp(), log_q.exp(), log_mixture(log_p, log_q, beta)
    with torch.autocast(p.device.type, enabled=False):  # its dots would be in bfloat16
        of_teacher = torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_mix)
        of_student = torch.linalg.vecdot(q, log_q) - torch.linalg.vecdot(q, log_mix)
    return beta * of_teacher + (1 - beta) * of_student


@dataclass(frozen=True)
class SkewedForwardKL(LogitTerm):
    """KL(teacher || alpha teacher + (1 - alpha) student), whose gradient stays bounded where the student is sure of
    another token (DistiLLM, arXiv 2402.03898; its alpha). At alpha = 0 it is the forward KL."""

    alpha: Annotated[float, Range(0, 0.999)] = 0.1

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return skewed_kl(teacher, student, self.alpha)


@dataclass(frozen=True)
class SkewedReverseKL(LogitTerm):
    """KL(student || alpha student + (1 - alpha) teacher) (DistiLLM, arXiv 2402.03898; its alpha). At alpha = 0 it is
    the reverse KL."""

    alpha: Annotated[float, Range(0, 0.999)] = 0.1

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return skewed_kl(student, teacher, self.alpha)


@dataclass(frozen=True)
class JensenShannon(LogitTerm):
    """The generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649). Over beta it tends to the forward KL at 0,
    over 1 - beta to the reverse KL at 1; closer to either than a thousandth it is all but nothing in float32 (ours)."""

    beta: Annotated[float, Range(0.001, 0.999)] = 0.5  # GKD's tests have 0.1, 0.5 and 0.9

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return jensen_shannon(student, teacher, self.beta)
