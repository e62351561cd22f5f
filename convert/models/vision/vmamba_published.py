"""The published checkpoints of VMamba (MzeroMiko/VMamba: vssm1_*, vmamba_*_s1l8 and *_s2l5) under our names."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

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
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"A checkpoint must be a file that torch wrote, of tensors alone; {file} cannot be read"
            f" ({type(error).__name__})."
        ) from None
    weights = found.get("model", found) if isinstance(found, dict) else None
    if not (isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())):
        raise UserError(f"A checkpoint of VMamba holds its weights by name, alone or as `model`; {file} holds neither.")
    if not any(name.endswith(".op.x_proj_weight") for name in weights):
        raise UserError(f"A checkpoint of VMamba has layers.0.blocks.0.op.x_proj_weight; {file} has none of that name.")
    return weights
