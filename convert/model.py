"""The converted model: a transformers host whose attention modules are slots for mixers, its configuration and its cache.

B batch · T tokens of this call · D width
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from convert.errors import UserError
from convert.fields import checked, require, shown
from convert.mixers import MIXERS
from convert.mixers.base import Context, Mixer, State
from convert.projections import Inputs, Projections, Shape, attention_name, layer_window


class ConvertedConfig(PreTrainedConfig):
    """`host`: the teacher's configuration as a dictionary. `mixers`: for each layer None (its attention is kept) or
    {"name", "shape", "options"}, from which the mixer is built."""

    model_type = "converted"

    def __init__(self, host: dict | None = None, mixers: list[dict | None] | None = None, **kwargs):
        self.host = host or {}
        self.mixers = mixers or []
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "max_position_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ):
            if name in self.host:
                kwargs.setdefault(name, self.host[name])
        self.use_cache = kwargs.pop("use_cache", True)
        kwargs.setdefault("tie_word_embeddings", self.host.get("tie_word_embeddings", False))
        super().__init__(**kwargs)

    def host_config(self) -> PreTrainedConfig:
        fields = {k: v for k, v in self.host.items() if k not in ("model_type", "dtype", "architectures", "transformers_version")}
        config = AutoConfig.for_model(self.host["model_type"], **fields)
        config._attn_implementation = self._attn_implementation
        return config

    @property
    def keeps_attention(self) -> bool:
        return any(mixer is None for mixer in self.mixers)


class StateLayer(CacheLayerMixin):
    """What one mixer carries from call to call: a tuple of tensors with the batch first, of which the first `narrow` are in the
    dtype of the model."""

    is_sliding = False
    is_compileable = False

    def __init__(self, narrow: int):
        super().__init__()
        self.narrow = narrow
        self.state: State | None = None

    def lazy_initialization(self, key_states, value_states):
        raise TypeError("A mixer's state is set by its slot, not by keys and values.")

    def update(self, key_states, value_states, *args, **kwargs):
        self.lazy_initialization(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices) -> None:
        if self.state is not None:
            self.state = tuple(t.index_select(0, indices.to(t.device)) for t in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = tuple(t.repeat_interleave(repeats, 0) for t in self.state)

    def crop(self, *args) -> None:
        raise ValueError("A recurrent state cannot be rolled back, so this cache cannot be cropped; generate without an assistant model.")


class StudentCache(Cache):
    """States of the mixers, keys and values of the kept layers, and the number of real tokens seen, per row."""

    is_compileable = False

    def __init__(self, config: ConvertedConfig):
        host = config.host_config()
        windows = [layer_window(host, i) for i in range(len(config.mixers))]
        super().__init__(layers=[
            StateLayer(MIXERS[mixer["name"]].narrow) if mixer is not None else DynamicSlidingWindowLayer(window) if window else DynamicLayer()
            for mixer, window in zip(config.mixers, windows, strict=True)
        ])  # fmt: skip
        self.seen = 0
        self.rows: Tensor | None = None  # [B]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Of the keys that a kept layer sees; transformers asks at whichever layer comes first."""
        layer = self.layers[layer_idx]
        return (self.seen + query_length, 0) if isinstance(layer, StateLayer) else layer.get_mask_sizes(query_length)

    def count(self, positions: Tensor, real: Tensor | None = None) -> None:
        """After a call whose tokens had these positions [B, T]. Padding alone counts for nothing."""
        self.seen += positions.shape[1]
        rows = positions[:, -1] + 1
        if real is not None:
            rows = torch.where(real.any(1), rows, 0 if self.rows is None else self.rows)
        self.rows = rows

    def crop(self, *args) -> None:
        for layer in self.layers:  # a mixer refuses; before any kept layer has been cropped
            if isinstance(layer, StateLayer):
                layer.crop(*args)
        super().crop(*args)

    def reset(self) -> None:
        super().reset()
        self.seen, self.rows = 0, None

    def reorder_cache(self, beam_idx) -> None:
        super().reorder_cache(beam_idx)
        if self.rows is not None:
            self.rows = self.rows.index_select(0, beam_idx.to(self.rows.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows = None if self.rows is None else self.rows.repeat_interleave(repeats)

    def batch_select_indices(self, indices) -> None:
        super().batch_select_indices(indices)
        self.rows = None if self.rows is None else self.rows.index_select(0, indices)

    def num_bytes(self) -> int:
        """Of all that it holds: states, convolution inputs, keys and values."""
        return sum(layer_bytes(layer) for layer in self.layers)


def layer_bytes(layer: CacheLayerMixin, dtype: torch.dtype | None = None) -> int:
    """Of one layer of a cache, ours or transformers'. Keys, values and latents count as `dtype` (None: as they are), sums and convolution
    inputs are always float32."""
    if isinstance(layer, StateLayer):
        narrow, wide = (layer.state or ())[: layer.narrow], (layer.state or ())[layer.narrow :]
    else:
        narrow, wide = (layer.keys, layer.values) if layer.is_initialized else (), ()
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in narrow) + sum(t.numel() * t.element_size() for t in wide)


class Slot(nn.Module):
    """A mixer where a decoder layer expects its attention: the one place that speaks transformers' calling convention."""

    def __init__(self, mixer: Mixer, layer: int):
        super().__init__()
        self.mixer = mixer
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, position_embeddings=None, past_key_values=None, layer_past=None, real=None, document_ids=None, **_
    ) -> tuple[Tensor, None]:
        cache = past_key_values if past_key_values is not None else layer_past  # gpt_neox uses the second name
        context = Context(*position_embeddings, real, document_ids)
        y, state = self.mixer(hidden_states, context, None if cache is None else cache.layers[self.layer].state)
        if cache is not None:
            cache.layers[self.layer].state = state
        return y, None


class ConvertedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model some of whose attention layers are mixers. `generate()` uses its constant-size state."""

    config_class = ConvertedConfig
    base_model_prefix = "host"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True
    _no_split_modules = ["GPTNeoXLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"]

    def __init__(self, config: ConvertedConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.host = AutoModelForCausalLM.from_config(config.host_config()) if host is None else host
        for layer, (block, spec) in enumerate(zip(self.blocks, config.mixers, strict=True)):
            if spec is not None and not isinstance(attention_of(block), Slot):
                kind = MIXERS[spec["name"]]
                mixer = kind(Shape(**spec["shape"]), kind.Options(**spec["options"]))
                setattr(block, attention_name(config.host["model_type"]), Slot(mixer, layer))
        if host is None:
            self.post_init()

    def _init_weights(self, module) -> None:
        pass  # every part starts as its constructor leaves it; a host built here is about to be loaded

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward() makes the cache

    @property
    def blocks(self) -> nn.ModuleList:
        return self.host.base_model.layers

    def slots(self) -> dict[int, Slot]:
        """Layer -> slot, of the converted layers."""
        return {i: attention_of(block) for i, block in enumerate(self.blocks) if isinstance(attention_of(block), Slot)}

    def get_input_embeddings(self):
        return self.host.get_input_embeddings()

    def get_output_embeddings(self):
        return self.host.get_output_embeddings()

    def set_input_embeddings(self, value) -> None:
        self.host.set_input_embeddings(value)

    def set_output_embeddings(self, value) -> None:
        self.host.set_output_embeddings(value)

    def hidden_states(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, cache: StudentCache | None = None
    ) -> Tensor:
        """The last hidden states [B, T, D], after the final norm. See `locate` for positions, padding and documents."""
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        positions, real, document_ids = locate(x, attention_mask, position_ids, cache)
        dummy = x.new_zeros(1, 1, 1, 1)  # a four-dimensional mask is passed on untouched: no T x T mask without attention
        y = self.host.base_model(
            inputs_embeds=x, attention_mask=attention_mask if self.config.keeps_attention else dummy, position_ids=positions,
            past_key_values=cache, use_cache=cache is not None, real=real, document_ids=document_ids,
        ).last_hidden_state  # fmt: skip
        if cache is not None:
            cache.count(positions, real)
        return y

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: StudentCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        if use_cache is None:  # packed documents have no use for a cache, and with one they would not be told apart
            packed = attention_mask is None and position_ids is not None and documents_of(position_ids) is not None
            use_cache = self.config.use_cache and not self.training and not packed
        if past_key_values is None and use_cache:
            past_key_values = StudentCache(self.config)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, inputs_embeds, past_key_values)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden[:, keep])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module, or the slot, of a decoder layer."""
    return block.attention if "attention" in block._modules else block.self_attn


def locate(x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: StudentCache | None):
    """Positions [B, T], and where there are any: which tokens are real [B, T], and document ids [B, T].

    Positions go on from the cache's count of each row's real tokens. A mask may cover all tokens so far or this call's.
    As in transformers, positions that jump in a call without mask or cache are packed documents.
    """
    B, T = x.shape[:2]
    real = None if attention_mask is None else attention_mask[:, -T:].bool()
    if real is not None and bool(real.all()):
        real = None
    document_ids = None
    if position_ids is None:
        steps = torch.ones(B, T, dtype=torch.long, device=x.device) if real is None else real.long()
        position_ids = (steps.cumsum(1) - 1).clamp(min=0)
        if cache is not None and cache.rows is not None:
            position_ids = position_ids + cache.rows[:, None]
    else:
        position_ids = position_ids.expand(B, T)
        if attention_mask is None and cache is None:
            document_ids = documents_of(position_ids)
    return position_ids, real, document_ids


def documents_of(position_ids: Tensor) -> Tensor | None:
    """Document ids [B, T] of packed rows, whose positions start anew in each document; None where no row has two."""
    jumps = position_ids.diff(dim=1) != 1
    return torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0)) if bool(jumps.any()) else None


def projections_of(model: PreTrainedModel, layer: int) -> Projections:
    """Of the attention, or the mixer, of one layer."""
    host = model.host if isinstance(model, ConvertedForCausalLM) else model
    old = attention_of(host.base_model.layers[layer])
    return old.mixer.projections() if isinstance(old, Slot) else Projections.of(old)


@checked
@torch.no_grad()
def swap(
    model: PreTrainedModel, name: Literal[tuple(MIXERS)], options=None, layers: Sequence[Annotated[int, (0, 1000)]] | None = None,
    inputs: Sequence[Inputs] | None = None,
) -> ConvertedForCausalLM:  # fmt: skip
    """Replace the attention, or the mixer, of these layers (None: all) by the mixer `name`. The model given is consumed.

    `inputs`: what a calibration saw, layer by layer."""
    kind = MIXERS[name]
    options = kind.Options() if options is None else options
    require(kind.Options, options, f"swap(): options of {name}")
    if isinstance(model, ConvertedForCausalLM):
        host, config = model.host, model.config
        specs = list(config.mixers)
    else:
        host, config = model, None
        specs = [None] * model.config.num_hidden_layers
    blocks = host.base_model.layers
    layers = tuple(range(len(blocks))) if layers is None else layers
    if len(set(layers)) < len(layers) or max(layers, default=0) >= len(blocks):
        raise UserError(f"swap(): layers must be within 0 .. {len(blocks) - 1}, each once; got {shown(layers)}.")
    if inputs is not None and len(inputs) != len(blocks):
        raise UserError(f"swap(): inputs must be one for each of {len(blocks)} layers; got {len(inputs)}.")

    def read(layer: int) -> Projections:
        projections = projections_of(model, layer)
        return projections if inputs is None else dataclasses.replace(projections, inputs=inputs[layer])

    for layer, fitted in zip(layers, kind.fit(map(read, layers), options), strict=True):
        projections = read(layer)
        with torch.device(projections.q.device):
            mixer = kind.from_projections(projections, fitted).to(projections.q.dtype)
        specs[layer] = {"name": name, "shape": dataclasses.asdict(projections.shape), "options": dataclasses.asdict(mixer.options)}
        setattr(blocks[layer], attention_name(host.config.model_type), Slot(mixer, layer))
    if config is None:
        config = ConvertedConfig(host=host.config.to_diff_dict() | {"model_type": host.config.model_type}, mixers=specs)
        config._attn_implementation = host.config._attn_implementation
    else:
        config.mixers = specs
    student = ConvertedForCausalLM(config, host)
    student.generation_config = model.generation_config
    return student.train(model.training)


AutoConfig.register("converted", ConvertedConfig, exist_ok=True)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM, exist_ok=True)
