"""Outputs of the stages of an image classifier, as terms see them, whatever the classifier's family.

B images · C channels · H height · W width · N tokens · D width of a token · K classes
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Outputs of the stages, maps [B, C, H, W] or tokens [B, N, D], and logits [B, K]."""

    stages: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True)
class StageShape:
    """Shape of a stage's output. A map has no special tokens; `height` and `width` are those of the grid."""

    is_map: bool
    width_of_features: int
    height: int
    width: int
    special_tokens: int = 0  # before the grid's: class and distillation tokens


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
