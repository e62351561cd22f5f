"""Outputs of the stages of an image classifier, as terms see them, whatever the classifier's family.

B images · C channels · H height · W width · N tokens · D width of a token · K classes
Of scans over places: 4 directions · L places · E channels · S state · r rank
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Scan(NamedTuple):
    """What a block's scan over places is made of: U and V [4, S, r], with orthonormal columns, and sigma [4, r] of the
    transitions U diag(sigma) V^T. `states()` computes the states [B, 4, L, E, S] after each place."""

    U: Tensor
    sigma: Tensor
    V: Tensor
    states: Callable[[], Tensor]


class Features(NamedTuple):
    """Outputs of the stages, maps [B, C, H, W] or tokens [B, N, D], logits [B, K], and the scans of all blocks where
    they are asked for and the classifier has some."""

    stages: tuple[Tensor, ...]
    logits: Tensor
    scans: tuple[Scan, ...] = ()


@dataclass(frozen=True)
class StageShape:
    """Shape of a stage's output. A map has no special tokens; `height` and `width` are those of the grid."""

    is_map: bool
    width_of_features: int
    height: int
    width: int
    special_tokens: int = 0  # before the grid's: class and distillation tokens


@dataclass(frozen=True)
class ScanShape:
    """Sizes of a block's scan over places; `rank` is that of its transitions."""

    places: int
    channels: int
    states: int
    rank: int


@dataclass(frozen=True)
class StagedModel:
    """A classifier with the shapes of its stages and scans; `num_labels` of its configuration is the number of
    classes."""

    model: nn.Module
    stages: Sequence[StageShape]
    scans: Sequence[ScanShape] = ()


def tokens_of(stage: Tensor, shape: StageShape) -> Tensor:
    """A stage's output as tokens [B, H W, D] without special ones."""
    if shape.is_map:
        return stage.flatten(2).transpose(1, 2)
    return stage[:, shape.special_tokens :]


def map_of(stage: Tensor, shape: StageShape) -> Tensor:
    """A stage's output as a map [B, C, H, W], without special tokens."""
    if shape.is_map:
        return stage
    return tokens_of(stage, shape).transpose(1, 2).unflatten(2, (shape.height, shape.width))


def pooled(stage: Tensor, shape: StageShape) -> Tensor:
    """A stage's output as one vector [B, D] of each image: the mean over places."""
    return tokens_of(stage, shape).mean(1)
