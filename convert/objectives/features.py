"""Terms that compare what layers return.

B batch · T tokens · D width
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.objectives.terms import AttentionTerm, BlockTerm, LayerTerm


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(student, teacher), both [..., D] (HedgeMamba, arXiv 2604.14191, eq. 6)."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def energy_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over the teacher's energy in each sequence, both [..., T, D], the mean over sequences: 1 for a
    student whose output is zero (Attention Editing, arXiv 2604.05688; this form is inferred from its description). A
    micro-batch never cuts a sequence, so the losses of micro-batches add up to that of the whole batch."""
    error, energy = (student - teacher).square().mean((-2, -1)), teacher.square().mean((-2, -1))
    return (error / (energy + 1e-12)).mean()


def l2_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of the L2 distance, not squared, both [..., D] (MOHAWK, arXiv 2408.10189)."""
    return (student - teacher).norm(dim=-1).mean()


@dataclass(frozen=True)
class CosineDistance(AttentionTerm):
    """The cosine distance of a mixer's output from the attention's (HedgeMamba's stage 1, arXiv 2604.14191)."""

    def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
        return cosine_distance(student, teacher)


@dataclass(frozen=True)
class EnergyMSE(AttentionTerm):
    """The squared error of a mixer's output over the energy of the attention's (Attention Editing, arXiv
    2604.05688)."""

    def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
        return energy_mse(student, teacher)


@dataclass(frozen=True)
class L2Distance(AttentionTerm):
    """The mean over tokens of the L2 distance of a mixer's output from the attention's, not squared (GenDistill's stage
    1, arXiv 2603.26556). It is that of the hidden states behind them, too, to which both add the same."""

    def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
        return l2_distance(student, teacher)


@dataclass(frozen=True)
class BlockL2Distance(BlockTerm):
    """The mean over tokens of the L2 distance of a decoder layer's output from the teacher's, not squared: the
    hidden-state alignment of MOHAWK (arXiv 2408.10189), stage 2 of GenDistill (arXiv 2603.26556). Where attention and
    MLP read the same input (GPT-NeoX's parallel residual) and mixers alone are trained, it equals L2Distance."""

    def loss(self, student: Tensor, teacher: Tensor, inputs: Tensor, owned: nn.Module | None) -> Tensor:
        return l2_distance(student, teacher)


@dataclass(frozen=True)
class BlockEnergyMSE(BlockTerm):
    """The squared error of a decoder layer's output over the energy of what the teacher's layer adds to its input: 1
    for a student whose layer adds nothing. The residual stream, which is the same in both, has no part in it (ours)."""

    def loss(self, student: Tensor, teacher: Tensor, inputs: Tensor, owned: nn.Module | None) -> Tensor:
        return energy_mse(student - inputs, teacher - inputs)


@dataclass(frozen=True)
class FeatureMatching(LayerTerm):
    """The cosine distance of the layers' outputs, the mean over layers (Attention Editing, arXiv 2604.05688; a weak
    term there: weights of 0.01 to 0.1). Student and teacher must have the same depth and width."""

    def build(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if teacher is None:
            return
        shapes = [(model.config.num_hidden_layers, model.config.hidden_size) for model in (student, teacher)]
        if shapes[0] != shapes[1]:
            (depth, width), (teacher_depth, teacher_width) = shapes
            raise UserError(
                f"feature_matching compares layers of one shape; the student has {depth} of width {width}, the teacher"
                f" {teacher_depth} of width {teacher_width}. Take hidden_projection."
            )

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], owned: nn.Module | None) -> Tensor:
        return torch.stack([cosine_distance(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
