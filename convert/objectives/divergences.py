"""Losses. Those of `align` compare two outputs of a layer; `Distill` compares two distributions over the next token.

N tokens · D width · V vocabulary
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from convert.core.fields import Range, check


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(student, teacher), both [..., D] (HedgeMamba, arXiv 2604.14191, eq. 6)."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def energy_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's energy in each sequence, both [..., T, D], the mean over sequences: 1 for a
    student that says nothing (Attention Editing, arXiv 2604.05688; this form is inferred from its description). A
    micro-batch never cuts a sequence, so the losses of micro-batches add up to that of the whole batch."""
    error, energy = (student - teacher).square().mean((-2, -1)), teacher.square().mean((-2, -1))
    return (error / (energy + 1e-12)).mean()


def cross_entropy(student_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Nats per token, [N]."""
    return F.cross_entropy(student_NV, targets_N, reduction="none")


def forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the softened distributions, [N] nats."""
    log_p, log_q = (F.log_softmax(z if temperature == 1 else z / temperature, -1) for z in (teacher_NV, student_NV))
    p = log_p.exp()
    with torch.autocast(p.device.type, enabled=False):  # its dots would be in bfloat16
        return temperature**2 * (
            torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)
        )  # no passes over p (log p - log q)


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(student || teacher) of the softened distributions, [N] nats."""
    return forward_kl(teacher_NV, student_NV, temperature)


@dataclass(frozen=True)
class Distill:
    """Weights of the terms of the whole-model loss; the temperature is that of the two KL terms."""

    cross_entropy: Annotated[float, Range(0, 1e6)] = 0.0
    forward_kl: Annotated[float, Range(0, 1e6)] = 1.0
    reverse_kl: Annotated[float, Range(0, 1e6)] = 0.0
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    feature_matching: Annotated[float, Range(0, 1e3)] = (
        0.0  # of the cosine distance of the layers' outputs, on average (Attention Editing; weak: 0.01 to 0.1)
    )

    __post_init__ = check

    @property
    def needs_teacher(self) -> bool:
        return self.forward_kl != 0 or self.reverse_kl != 0 or self.feature_matching != 0

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor | None, targets_N: Tensor) -> Tensor:
        """Summed over the tokens; the features are the stage's to match."""
        loss = student_NV.new_zeros(())
        if self.cross_entropy:
            loss = loss + self.cross_entropy * cross_entropy(student_NV, targets_N).sum()
        if self.forward_kl:
            loss = loss + self.forward_kl * forward_kl(student_NV, teacher_NV, self.temperature).sum()
        if self.reverse_kl:
            loss = loss + self.reverse_kl * reverse_kl(student_NV, teacher_NV, self.temperature).sum()
        return loss


def backward(*roots: Tensor, gradients: tuple[Tensor | None, ...] | None = None) -> None:
    """Backpropagate with autocast off, wherever it is called: operators then compute their gradients in the precision
    of their own tensors."""
    with torch.autocast(roots[0].device.type, enabled=False):
        torch.autograd.backward(roots, gradients)


def backward_through_head(hidden_ND: Tensor, head, loss_of_logits, chunk: int, also: Tensor | None = None) -> Tensor:
    """Backpropagate sum(loss_of_logits(head(hidden), rows)) without ever holding the logits of more than `chunk`
    tokens.

    `loss_of_logits(logits, rows)` gets a chunk's logits and the slice of its rows. Gradients of the head and of what
    made `hidden_ND` accumulate as a plain backward's would. `also`: another loss from the same graph. Returns the
    loss."""
    leaf = hidden_ND.detach().requires_grad_(hidden_ND.requires_grad)
    total = torch.zeros((), device=hidden_ND.device)
    for start in range(0, len(leaf), chunk):
        rows = slice(start, min(start + chunk, len(leaf)))
        loss = loss_of_logits(head(leaf[rows]).float(), rows)
        backward(loss)
        total += loss.detach()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # of no tokens there is none
    if also is not None:
        backward(hidden_ND, also, gradients=(gradient, None))
        return total + also.detach()
    if hidden_ND.requires_grad:
        backward(hidden_ND, gradients=(gradient,))
    return total
