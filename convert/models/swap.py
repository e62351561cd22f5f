"""Replacing the attention, or the mixers, of a model's layers by mixers."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Range, checked, require, shown
from convert.mixers import MIXERS
from convert.mixers.families import attention_name
from convert.mixers.init import STARTS
from convert.mixers.projections import CalibrationStats, Projections, refusal
from convert.models.config import ConvertedConfig
from convert.models.slot import Slot, attention_of
from convert.models.student import ConvertedForCausalLM


def projections_of(model: PreTrainedModel, layer: int) -> Projections:
    """The record of the attention, or of the mixer, of one layer."""
    host = model.host if isinstance(model, ConvertedForCausalLM) else model
    old, rotary = attention_of(host.base_model.layers[layer]), host.base_model.rotary_emb
    if isinstance(old, Slot):
        found = STARTS[model.config.mixers[layer]["name"]].projections(old.mixer)
    else:
        found = Projections.of(old, rotary)
    return dataclasses.replace(found, rotary_scale=rotary.attention_scaling)


@checked
@torch.no_grad()
def swap(
    model: PreTrainedModel,
    name: Literal[tuple(MIXERS)],  # type: ignore[valid-type]
    options: Any = None,
    layers: Sequence[Annotated[int, Range(0, 1000)]] | None = None,
    stats: Sequence[CalibrationStats] | None = None,
) -> ConvertedForCausalLM:
    """Replace the attention, or the mixer, of these layers (None: all) by the mixer `name`. The model given is
    consumed. Other layers keep what they have: swaps of different layers make a hybrid of several mixers.

    `stats`: what a calibration saw, layer by layer."""
    kind, start = MIXERS[name], STARTS[name]
    options = kind.Options() if options is None else options
    require(kind.Options, options, f"swap(): options of {name}")
    if isinstance(model, ConvertedForCausalLM):
        host, config = model.host, model.config
        specs = list(config.mixers)
    else:
        host, config = model, None
        specs = [None] * model.config.num_hidden_layers
    if reason := refusal(host.config):
        raise UserError(f"swap(): {reason}")
    blocks = host.base_model.layers
    layers = tuple(range(len(blocks))) if layers is None else layers
    if len(set(layers)) < len(layers) or max(layers, default=0) >= len(blocks):
        raise UserError(f"swap(): layers must be within 0 .. {len(blocks) - 1}, each once; got {shown(layers)}.")
    if stats is not None and len(stats) != len(blocks):
        raise UserError(f"swap(): stats must be one for each of {len(blocks)} layers; got {len(stats)}.")

    def read(layer: int) -> Projections:
        projections = projections_of(model, layer)
        return projections if stats is None else dataclasses.replace(projections, stats=stats[layer])

    for layer, fitted in zip(layers, start.fit(map(read, layers), options), strict=True):
        projections = read(layer)
        with torch.device(projections.q.device):
            mixer = start.from_projections(projections, fitted).to(projections.q.dtype)
        specs[layer] = {
            "name": name,
            "shape": dataclasses.asdict(projections.shape),
            "options": dataclasses.asdict(mixer.options),
        }
        setattr(blocks[layer], attention_name(host.config.model_type), Slot(mixer, layer))
    if config is None:
        config = ConvertedConfig(host.config, specs)
    else:
        config = copy.copy(config)  # the caller may go on with the old one: a plan swaps into a model made of it
        config.mixers = specs
    student = ConvertedForCausalLM(config, host)
    student.generation_config = model.generation_config
    student.generation_config.cache_implementation = None  # the teacher's own cache means nothing to its student
    return student.train(model.training)
