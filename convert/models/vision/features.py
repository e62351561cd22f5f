"""Outputs of the stages of an image classifier, whatever its family.

B images · C channels · H height · W width · N tokens · D width of a token · K classes
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.models.vision.catalog import TIMM
from convert.models.vision.inputs import model_inputs, preprocessing_of
from convert.models.vision.scans import recorded, scan_of, shape_of
from convert.objectives.stages import Features, StagedModel, StageShape, map_of, pooled, tokens_of

__all__ = ["Features", "StageShape", "features", "logits", "map_of", "pooled", "stage_shapes", "staged", "tokens_of"]

STAGES = 4  # what an isotropic model is cut into (One-for-All KD, arXiv 2310.19444)


def features(model: PreTrainedModel, images: Tensor, scans: bool = False) -> Features:
    """Outputs of a model for images [B, C, H, W] with values from 0 to 1, which it sees in its own normalisation; and
    what its scans over places are made of, if that is asked."""
    with recorded(model if scans else None) as calls:
        found = model(pixel_values=model_inputs(model, images), output_hidden_states=True)
    chosen = _chosen(found.hidden_states, model.config.model_type != TIMM)
    made = tuple(scan_of(*call) for call in calls)
    return Features(tuple(found.hidden_states[i] for i in chosen), found.logits, made)


def logits(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Logits [B, K] alone, for the same images as `features`."""
    return model(pixel_values=model_inputs(model, images)).logits


def _chosen(hidden: Sequence[Tensor], embeds: bool) -> list[int]:
    """The numbers of the hidden states that are stages: the last of each of the last four resolutions, or the ends of
    the quarters of a model that has one resolution. Those of a family that `embeds` begin with the embedding where
    there are more than four; those of timm are outputs of blocks alone."""
    first = 1 if embeds and len(hidden) > STAGES else 0
    blocks = range(first, len(hidden))
    if len(blocks) <= STAGES:
        return list(blocks)
    last_of = {_resolution(hidden[i]): i for i in blocks}
    if len(last_of) > 1:
        return sorted(last_of.values())[-STAGES:]
    return [first + math.ceil(len(blocks) * quarter / STAGES) - 1 for quarter in range(1, STAGES + 1)]


def _resolution(hidden: Tensor) -> tuple[int, ...]:
    return tuple(hidden.shape[2:]) if hidden.dim() == 4 else (hidden.shape[1],)


def stage_shapes(model: PreTrainedModel) -> tuple[StageShape, ...]:
    """Shapes of the stages. Raises UserError for a model whose outputs are neither maps nor square grids of tokens."""
    return tuple(staged(model).stages)


@torch.no_grad()
def staged(model: PreTrainedModel) -> StagedModel:
    """A model with the shapes of its stages and scans, found by a pass of one empty image; it may be on the meta
    device.

    Raises UserError for a model whose outputs are neither maps nor square grids of tokens."""
    wanted = preprocessing_of(model.config)
    is_training = model.training
    image = torch.zeros(1, wanted.channels, wanted.height, wanted.width, device=model.device)
    with recorded(model) as calls:
        found = features(model.eval(), image)
    model.train(is_training)
    shapes = tuple(_shape(stage, model.config.model_type) for stage in found.stages)
    return StagedModel(model, shapes, tuple(shape_of(*call) for call in calls))


def _shape(stage: Tensor, family: str) -> StageShape:
    if stage.dim() == 4:
        return StageShape(True, *stage.shape[1:])
    if stage.dim() != 3:
        raise UserError(
            f"Stages of a classifier must be maps or tokens; those of {family} have shape {tuple(stage.shape)}."
        )
    side = math.isqrt(stage.shape[1])
    return StageShape(False, stage.shape[2], side, side, stage.shape[1] - side * side)
