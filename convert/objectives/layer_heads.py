"""One-for-All distillation of language models: decoder layers are compared with the teacher over the vocabulary, where
models of any architecture agree.

N tokens · V vocabulary · K tokens that are told apart · D width
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Range
from convert.objectives.terms import HeadTerm


def told_apart(teacher_NV: Tensor, targets_N: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The target and the `top_k` most likely tokens [N, K], and their probabilities [N, K]. Where the target is among
    the latter, it has probability 0 there."""
    p = F.softmax(teacher_NV, -1)
    likely = p.topk(min(top_k, p.shape[-1]), -1).indices
    tokens = torch.cat([targets_N[:, None], likely], -1)
    found = p.gather(-1, tokens)
    found[:, 1:].masked_fill_(likely == targets_N[:, None], 0.0)
    return tokens, found


def bucketed_cross_entropy(student_NV: Tensor, tokens_NK: Tensor, p_NK: Tensor, gamma: float) -> Tensor:
    """The enhanced cross-entropy [N] of One-for-All distillation over the tokens that are told apart, the target first,
    and the rest of the vocabulary as one token. With all tokens told apart it is that over the vocabulary."""
    rest = (1 - p_NK.sum(-1)).clamp(min=0)
    weights = torch.cat([(1 + p_NK[:, :1]) ** gamma - 1, p_NK[:, 1:] ** gamma], -1)
    log_all = student_NV.logsumexp(-1)
    log_q = student_NV.gather(-1, tokens_NK) - log_all[:, None]
    others = student_NV.scatter(-1, tokens_NK, -math.inf)
    is_some = others.amax(-1) > -math.inf
    log_rest = torch.where(is_some[:, None], others, 0.0).logsumexp(-1) - log_all
    return -(weights * log_q).sum(-1) - torch.where(is_some, rest**gamma * log_rest, 0.0)


@dataclass(frozen=True)
class OneForAllLayers(HeadTerm):
    """The enhanced cross-entropy (OFA-KD, arXiv 2310.19444) of logits that the student's own head makes of the ends of
    the last quarters of its layers, each through an RMSNorm and a linear layer of its own, against the teacher's final
    distribution. All of it but the formula is ours: the `top_k` likeliest tokens and the target are told apart, and the
    linear layer starts as the identity."""

    gamma: Annotated[float, Range(0.1, 10)] = 1.0
    branches: Annotated[int, Range(1, 4)] = 4
    top_k: Annotated[int, Range(1, 2**20)] = 32

    def layers(self, depth: int) -> Sequence[int]:
        return sorted({math.ceil(depth * quarter / 4) - 1 for quarter in range(1, 5)})[-self.branches :]

    def build(self, student: nn.Module, teacher: nn.Module | None) -> nn.Module:
        width, device = student.config.hidden_size, next(student.parameters()).device
        projectors = [
            nn.Sequential(nn.RMSNorm(width, device=device), nn.Linear(width, width, bias=False, device=device))
            for _ in self.layers(student.config.num_hidden_layers)
        ]
        for projector in projectors:
            nn.init.eye_(projector[1].weight)
        return nn.ModuleList(projectors)

    def reference(self, teacher: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return told_apart(teacher, targets, self.top_k)

    def hidden(self, output: Tensor, branch: int, owned: Any) -> Tensor:
        return owned[branch](output)

    def loss(self, student: Tensor, reference: Sequence[Tensor], owned: nn.Module | None) -> Tensor:
        tokens, p = reference
        return bucketed_cross_entropy(student, tokens, p, self.gamma)
