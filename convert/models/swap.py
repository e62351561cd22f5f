"""Replacing the attention, or the mixers, of a model's layers by mixers."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Range, checked, require, shown
from convert.mixers import MIXERS
from convert.mixers.base import Mixer
from convert.mixers.families import attention_name
from convert.mixers.init import STARTS
from convert.mixers.projections import CalibrationStats, Projections, refusal
from convert.models.config import ConvertedConfig
from convert.models.sharding import is_shared_out, outline_of, reshard, shared_out, take_over, unsharded
from convert.models.slot import Slot, attention_of
from convert.models.student import ConvertedForCausalLM

Stats = Sequence[CalibrationStats]  # what a calibration saw, layer by layer
Mixers = Iterator[tuple[int, dict[str, Any], Mixer]]  # each layer, its entry in the configuration, and its mixer


def projections_of(model: PreTrainedModel, layer: int) -> Projections:
    """The record of the attention, or of the mixer, of one layer."""
    host = _host_of(model)
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
    consumed. Other layers keep what they have: swaps of different layers make a hybrid of several mixers. Of a model
    that is shared out another one is made, so are its mixers, and one layer at a time is whole.

    `stats`: what a calibration saw, layer by layer."""
    kind = MIXERS[name]
    options = kind.Options() if options is None else options
    require(kind.Options, options, f"swap(): options of {name}")
    host = _host_of(model)
    if reason := refusal(host.config):
        raise UserError(f"swap(): {reason}")
    blocks = host.base_model.layers
    layers = tuple(range(len(blocks))) if layers is None else layers
    if len(set(layers)) < len(layers) or max(layers, default=0) >= len(blocks):
        raise UserError(f"swap(): layers must be within 0 .. {len(blocks) - 1}, each once; got {shown(layers)}.")
    if stats is not None and len(stats) != len(blocks):
        raise UserError(f"swap(): stats must be one for each of {len(blocks)} layers; got {len(stats)}.")
    fitted = STARTS[name].fit(_read(reshard(model), layers, stats), options)
    mixers = functools.partial(_mixers, name, layers, fitted)
    if is_shared_out(model):
        student = _replaced_in_parts(model, layers, mixers, stats)
    else:
        student = _replaced(model, mixers(model, stats))
    student.generation_config.cache_implementation = None  # the teacher's own cache means nothing to its student
    return student.train(model.training)


def _host_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model around the mixers."""
    return model.host if isinstance(model, ConvertedForCausalLM) else model


def _read(model: PreTrainedModel, layers: Sequence[int], stats: Stats | None) -> Iterator[Projections]:
    """The record of each of these layers, which is there until the next one is asked for."""
    for layer in layers:
        with unsharded(_host_of(model).base_model.layers[layer]):
            found = projections_of(model, layer)
            yield found if stats is None else dataclasses.replace(found, stats=stats[layer])


def _mixers(
    name: str, layers: Sequence[int], fitted: Sequence[Any], model: PreTrainedModel, stats: Stats | None
) -> Mixers:
    """The new mixers of a model, each whole in each process. `fitted`: the options of each layer."""
    for layer, options, projections in zip(layers, fitted, _read(model, layers, stats), strict=True):
        with torch.device(projections.q.device):
            mixer = STARTS[name].from_projections(projections, options).to(projections.q.dtype)
        shape, chosen = dataclasses.asdict(projections.shape), dataclasses.asdict(mixer.options)
        yield layer, {"name": name, "shape": shape, "options": chosen}, mixer


def _replaced(model: PreTrainedModel, mixers: Mixers) -> ConvertedForCausalLM:
    """The student, made of the model itself."""
    host = _host_of(model)
    config = model.config if isinstance(model, ConvertedForCausalLM) else None
    specs = [None] * model.config.num_hidden_layers if config is None else list(config.mixers)
    for layer, spec, mixer in mixers:
        specs[layer] = spec
        setattr(host.base_model.layers[layer], attention_name(host.config.model_type), Slot(mixer, layer))
    if config is None:
        config = ConvertedConfig(host.config, specs)
    else:
        config = copy.copy(config)  # the caller may go on with the old one: a plan swaps into a model made of it
        config.mixers = specs
    student = ConvertedForCausalLM(config, host)
    student.generation_config = model.generation_config
    return student


def _replaced_in_parts(
    model: PreTrainedModel,
    layers: Sequence[int],
    mixers: Callable[[PreTrainedModel, Stats | None], Mixers],
    stats: Stats | None,
) -> ConvertedForCausalLM:
    """The student of a model that is shared out: rows of what it keeps stay where they are. `mixers` makes
    those of a model."""
    nowhere = None if stats is None else [CalibrationStats(**_on_meta(seen)) for seen in stats]
    with torch.random.fork_rng(devices=()):
        outline = copy.deepcopy(outline_of(model))
        outline = _replaced(outline, mixers(outline, nowhere))
    student = shared_out(outline, model.device)
    slots = student.slots()
    take_over(student.host, _host_of(model), but=[slots[layer] for layer in layers])
    for layer, _, mixer in mixers(model, stats):
        take_over(slots[layer].mixer, mixer)
    return student


def _on_meta(stats: CalibrationStats) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to("meta") for name, t in vars(stats).items()}
