"""Terms that compare distributions over the next token, or over the classes of an image.

N tokens or images · V vocabulary or classes · K most likely tokens
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Range
from convert.objectives.recorded import RecordedTeacher
from convert.objectives.terms import LogitTerm


def cross_entropy(student_NV: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Nats, [N]. `targets` are tokens [N], or probabilities [N, V]: where those are all 0, so is the loss.

    `label_smoothing` is the share of the uniform distribution in the targets (Inception-v3, arXiv 1512.00567)."""
    loss = F.cross_entropy(student_NV, targets, reduction="none", label_smoothing=label_smoothing)
    return loss if targets.dim() == 1 else torch.where(targets.sum(-1) > 0, loss, 0.0)


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the softened distributions, [N] nats. T^2 keeps the size of the gradients, which
    shrink by as much (Hinton et al., arXiv 1503.02531)."""
    log_p, log_q = (F.log_softmax(z if temperature == 1 else z / temperature, -1) for z in (teacher_NV, student_NV))
    p = log_p.exp()
    with torch.autocast(p.device.type, enabled=False):  # its dots would be in bfloat16
        # two dots instead of p (log p - log q): no passes over tensors of this size
        return temperature**2 * (torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q))


def recorded_kl(student_NV: Tensor, teacher: RecordedTeacher) -> Tensor:
    """KL(teacher || student), [N] nats, as far as it can be told from what was kept.

    Without drawn tokens all tokens but the K are one: never above the whole KL, and the same at K = V. With drawn
    tokens it is an estimate whose mean over draws is the whole KL, and the mean of its gradient the whole gradient
    (importance sampling, "Sparse Logit Sampling", arXiv 2503.16870; the K exact ones, which leave the draws less to
    differ in, are ours)."""
    ids, kept = teacher.ids, teacher.log_p.shape[-1] - 1
    picked = student_NV.gather(-1, ids)
    if ids.shape[-1] == kept == student_NV.shape[-1]:
        return forward_kl(picked, teacher.log_p[:, :-1])
    if ids.shape[-1] == kept:
        others = student_NV.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return forward_kl(torch.cat([picked, others], -1), teacher.log_p)
    if teacher.negative_entropy is None:
        raise ValueError("tokens were drawn, and the entropy is missing")
    p, num_drawn = F.softmax(teacher.log_p, -1), ids.shape[-1] - kept
    weights = torch.cat([p[:, :-1], (p[:, -1:] / num_drawn).expand(-1, num_drawn)], -1)
    with torch.autocast(p.device.type, enabled=False):  # its dot would be in bfloat16
        return teacher.negative_entropy - torch.linalg.vecdot(weights, picked) + student_NV.logsumexp(-1)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher) of the softened distributions, [N] nats."""
    return forward_kl(teacher_NV, student_NV, temperature)


def balanced_kl(student_NV: Tensor, teacher_NV: Tensor, stress: float) -> Tensor:
    """KL(teacher || student) + KL(student || teacher), [N] nats, one of them times `stress`: the reverse one for tokens
    whose student has the higher entropy, else the forward one. No gradient flows through that choice."""
    log_p, log_q = F.log_softmax(teacher_NV, -1), F.log_softmax(student_NV, -1)
    p, q = log_p.exp(), log_q.exp()
    with torch.autocast(p.device.type, enabled=False):  # its dots would be in bfloat16
        pp, pq, qp, qq = (torch.linalg.vecdot(a, b) for a, b in ((p, log_p), (p, log_q), (q, log_p), (q, log_q)))
    less_certain = qq < pp  # the dots of a distribution with its own logarithm are its entropies, negated
    return (pp - pq) * torch.where(less_certain, 1.0, stress) + (qq - qp) * torch.where(less_certain, stress, 1.0)


@dataclass(frozen=True)
class CrossEntropy(LogitTerm):
    """The negative log-likelihood of the text's next token, or of an image's class where it is known: its mean over a
    batch is that over the images whose class is known."""

    needs_teacher: ClassVar[bool] = False
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        loss = cross_entropy(student, targets, self.label_smoothing)
        if targets.dim() == 1:
            return loss
        return loss * (len(targets) / (targets.sum(-1) > 0).sum().clamp(min=1))


@dataclass(frozen=True)
class ForwardKL(LogitTerm):
    """KL(teacher || student), both softened by a temperature (Hinton et al., arXiv 1503.02531)."""

    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def why_not_recorded(self) -> str | None:
        return None if self.temperature == 1 else "whose temperature needs the teacher's probabilities of all tokens"

    def loss(
        self,
        student: Tensor,
        teacher: Tensor | RecordedTeacher | None,
        targets: Tensor,
        owned: nn.Module | None,
    ) -> Tensor:
        if isinstance(teacher, RecordedTeacher):
            return recorded_kl(student, teacher)
        return forward_kl(student, teacher, self.temperature)


@dataclass(frozen=True)
class ReverseKL(LogitTerm):
    """KL(student || teacher), both softened by a temperature (MiniLLM, arXiv 2306.08543)."""

    temperature: Annotated[float, Range(0.01, 100)] = 1.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return reverse_kl(student, teacher, self.temperature)


@dataclass(frozen=True)
class BDKD(LogitTerm):
    """Balanced divergence distillation (BD-KD, arXiv 2212.12965): forward and reverse KL together, weighted token by
    token by the entropies of the two models.

    The pair and that entropies weight it are the paper's; which KL is stressed where, and by how much, are ours: the
    reverse one pulls a student together that is less certain than its teacher, the forward one spreads one that is more
    certain. The paper's cross-entropy is a term of its own here, and its teacher, which learns as well, is fixed."""

    stress: Annotated[float, Range(1, 1000)] = 2.0

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        return balanced_kl(student, teacher, self.stress)
