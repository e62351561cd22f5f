"""The published checkpoints of VMamba (MzeroMiko/VMamba: vssm1_*, of the sizes s1l8 and s1l20) under our names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.core.errors import UserError

# names there -> ours
PUBLISHED = (
    (r"^patch_embed\.0\.", "embed.0.conv."),
    (r"^patch_embed\.2\.", "embed.0.norm."),
    (r"^patch_embed\.5\.", "embed.2.conv."),
    (r"^patch_embed\.7\.", "embed.2.norm."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.blocks.\2.norm1."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.norm2\.", r"stages.\1.blocks.\2.norm2."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"stages.\1.blocks.\2.mlp.0."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"stages.\1.blocks.\2.mlp.2."),
    (r"^layers\.(\d+)\.blocks\.(\d+)\.op\.", r"stages.\1.blocks.\2.mixer."),
    (r"mixer\.conv2d\.", "mixer.conv."),
    (r"mixer\.x_proj_weight$", "mixer.x_proj"),
    (r"mixer\.dt_projs_weight$", "mixer.dt_proj"),
    (r"mixer\.dt_projs_bias$", "mixer.dt_bias"),
    (r"mixer\.A_logs$", "mixer.A_log"),
    (r"mixer\.Ds$", "mixer.D"),
    (r"mixer\.out_norm\.", "mixer.norm."),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "classifier."),
)


def from_published(weights: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a published checkpoint under our names, in the shapes of `model`, where they have as many
    numbers."""
    own, found = model.state_dict(), {}
    for name, value in weights.items():
        # a downsampling ends a stage there, and begins the next one here
        name = re.sub(r"^layers\.(\d+)\.downsample\.1\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv.", name)
        name = re.sub(r"^layers\.(\d+)\.downsample\.3\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm.", name)
        for pattern, replacement in PUBLISHED:
            name = re.sub(pattern, replacement, name)
        fits = name in own and own[name].numel() == value.numel()
        found[name] = value.reshape(own[name].shape) if fits else value
    return found


def read_published(file: Path) -> dict[str, Tensor]:
    """The weights in a published .pth file, which is read without running code.

    Raises UserError where it cannot be read, or holds no VMamba."""
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # of whatever kind: a pickle may hold anything
        raise UserError(
            f"A checkpoint must be a file that torch wrote, of tensors and numbers alone; {file} cannot be read"
            f" ({type(error).__name__}). Give the file as its authors published it."
        ) from None
    weights: Any = found.get("model", found) if isinstance(found, dict) else None
    is_named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not is_named or not any(name.endswith(".op.x_proj_weight") for name in weights):
        raise UserError(
            f"A checkpoint of VMamba holds its weights by name, alone or as `model`, layers.0.blocks.0.op.x_proj_weight"
            f" among them; {file} does not. Give the file as its authors published it."
        )
    return weights
