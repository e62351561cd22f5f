"""The converted model: a transformers host whose attention modules are slots for mixers, and its configuration.

B batch · T tokens of this call · D width
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from convert.core.errors import UserError
from convert.core.fields import Range, checked, require, shown
from convert.mixers import MIXERS
from convert.mixers.base import Context, Mixer
from convert.mixers.projections import Inputs, Projections, Shape, attention_name, refusal
from convert.models.cache import CACHE_NAME, CACHE_NAMES, StudentCache, check_cache
from convert.models.positions import documents_of, follows, locate

OF_THE_SEARCH = ("tokenizer", "assistant_tokenizer")  # arguments of generate()


def _of_host(name: str) -> property:
    """A field of the host's configuration, read and written there: one fact has one place."""
    return property(lambda self: getattr(self.host, name), lambda self, value: setattr(self.host, name, value))


class ConvertedConfig(PreTrainedConfig):
    """`host`: the teacher's configuration, the live host's own; a dictionary of it in files. `mixers`: for each layer
    None (its attention is kept) or {"name", "shape", "options"}, from which the mixer is built."""

    model_type = "converted"
    sub_configs = {"host": AutoConfig}  # what is set for the attention of all layers reaches it

    vocab_size, tie_word_embeddings, use_cache = (
        _of_host("vocab_size"),
        _of_host("tie_word_embeddings"),
        _of_host("use_cache"),
    )
    hidden_size, num_hidden_layers = _of_host("hidden_size"), _of_host("num_hidden_layers")
    max_position_embeddings = _of_host("max_position_embeddings")
    bos_token_id, eos_token_id, pad_token_id = (
        _of_host("bos_token_id"),
        _of_host("eos_token_id"),
        _of_host("pad_token_id"),
    )

    def __init__(self, host: dict | PreTrainedConfig | None = None, mixers: list[dict | None] | None = None, **kwargs):
        if isinstance(host, dict):
            fields = {
                k: v
                for k, v in host.items()
                if k not in ("model_type", "dtype", "architectures", "transformers_version")
            }
            host = AutoConfig.for_model(host["model_type"], **fields)
        self.host = (
            PreTrainedConfig() if host is None else host
        )  # transformers makes one without arguments, to compare with
        self.mixers = mixers or []
        kwargs.setdefault("attn_implementation", self.host._attn_implementation)
        super().__init__(**kwargs)

    def host_config(self) -> PreTrainedConfig:
        return self.host

    @property
    def keeps_attention(self) -> bool:
        return any(mixer is None for mixer in self.mixers)


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of the model tells each of its mixers; through the host, whose own arguments change their names.

    `real` bool [B, T], `document_ids` [B, T]: as in Context."""

    real: Tensor | None = None
    document_ids: Tensor | None = None
    cache: StudentCache | None = None


class Slot(nn.Module):
    """A mixer where a decoder layer expects its attention: the one place that speaks transformers' calling
    convention."""

    def __init__(self, mixer: Mixer, layer: int):
        super().__init__()
        self.mixer = mixer
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        call: Call | None = None,
        cache=None,
        past_key_values=None,
        layer_past=None,
        attention_mask=None,
        position_ids=None,
        use_cache=None,
        is_causal=True,
        output_hidden_states=None,
        output_attentions=None,
    ) -> tuple[Tensor, None]:
        """The cache has another name in each version of transformers. Masks and positions are in `call` and the rotary
        table, the other names mean nothing to a mixer, and what has none here is refused: it may mean something."""
        if call is None:
            raise TypeError(
                "A mixer is told by ConvertedForCausalLM where padding and documents are: call that, not the host"
                " inside of it."
            )
        if is_causal is False:
            raise TypeError("A mixer cannot look ahead, as is_causal=False asks.")
        given = next((c for c in (cache, past_key_values, layer_past) if c is not None), None)
        if given is not call.cache:
            raise TypeError(
                f"Layer {self.layer} must be given the cache of the call, and was given {given!r}: transformers handed"
                " it on otherwise."
            )
        x, layer = hidden_states, None if given is None else given.layers[self.layer]
        real, document_ids = (None if t is None else t.to(x.device) for t in (call.real, call.document_ids))
        y, state = self.mixer(
            x, Context(*position_embeddings, real, document_ids), None if layer is None else layer.state
        )
        if layer is not None:
            layer.state = state
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
    accepts_loss_kwargs = True  # Trainer asks: num_items_in_batch
    _no_split_modules = [
        "GPTNeoXLayer",
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    ]

    def __init__(self, config: ConvertedConfig, host: PreTrainedModel | None = None):
        super().__init__(config)
        self.host = AutoModelForCausalLM.from_config(config.host) if host is None else host
        config.host = self.host.config
        for layer, (block, spec) in enumerate(zip(self.blocks, config.mixers, strict=True)):
            if spec is not None and not isinstance(attention_of(block), Slot):
                kind = MIXERS[spec["name"]]
                mixer = kind(Shape(**spec["shape"]), kind.Options(**spec["options"]))
                setattr(block, attention_name(config.host.model_type), Slot(mixer, layer))
        if host is None:
            self.post_init()

    def _init_weights(self, module) -> None:
        pass  # every part starts as its constructor leaves it; a host built here is about to be loaded

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, and then one token decoded with the cache is held against a full pass."""
        loaded = super().from_pretrained(*args, **kwargs)
        check_cache(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

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
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        cache: StudentCache | None = None,
    ) -> Tensor:
        """The last hidden states [B, T, D], after the final norm. See `locate` for positions, padding and documents."""
        return self._outputs(input_ids, attention_mask, position_ids, inputs_embeds, cache, False).last_hidden_state

    def _outputs(
        self,
        input_ids,
        attention_mask,
        position_ids,
        inputs_embeds,
        cache: StudentCache | None,
        output_hidden_states: bool,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is not None:
            cache.check(x.shape[0], len(self.config.mixers))
        positions, real, document_ids = locate(x, attention_mask, position_ids, cache, self.config.keeps_attention)
        dummy = x.new_zeros(
            1, 1, 1, 1
        )  # a four-dimensional mask is passed on untouched: no T x T mask without attention
        outputs = self.host.base_model(
            inputs_embeds=x,
            attention_mask=attention_mask if self.config.keeps_attention else dummy,
            position_ids=positions,
            use_cache=cache is not None,
            call=Call(real, document_ids, cache),
            output_hidden_states=output_hidden_states,
            output_attentions=False,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
        if cache is not None:
            cache.count(positions, real)
        return outputs

    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, *args, **kwargs):
        """As in transformers, with the cache of this model, which no other can stand for."""

        def setting(name: str):
            settings = (getattr(config, name, None) for config in (generation_config, self.generation_config))
            return kwargs.get(name) or next(filter(None, settings), None)

        asked = setting("cache_implementation")
        if asked not in (None, "dynamic"):
            raise ValueError(
                "The states of this model's mixers need its own cache, a StudentCache, which generate() makes;"
                f" cache_implementation={asked!r} asks for another. Leave it out."
            )
        if (
            setting("prefill_chunk_size")
            and kwargs.get("use_cache") is not False
            and not set(CACHE_NAMES) & set(kwargs)
        ):
            kwargs[CACHE_NAME] = StudentCache(self.config)  # transformers wants to see one before the first chunk
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """What the search alone uses, transformers hands on to the model too: host models swallow it."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in OF_THE_SEARCH}

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: StudentCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, cache: StudentCache | None = None,
        output_hidden_states: bool | list[int] | None = None, num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None, ignore_index: int = -100, **others,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """As a causal language model of transformers. `past_key_values` and `cache`: the two names of one argument.
        `others` are refused if they ask for anything; `cache_position`, if it says anything but what follows from the
        cache."""
        cache_position = others.pop(
            "cache_position", None
        )  # not in the signature, for which transformers would make one at each step
        if others.get("output_attentions") is None:
            others["output_attentions"] = self.config.output_attentions
        _refuse(others)
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names of one argument; give one of them.")
        cache = self._cache_of_call(
            past_key_values if cache is None else cache, use_cache, attention_mask, position_ids
        )
        x = input_ids if inputs_embeds is None else inputs_embeds
        if cache_position is not None and x is not None and not follows(cache_position, x, cache):
            raise ValueError(
                "Tokens follow those that the cache has seen: cache_position, which loops for transformers 4 pass, must"
                " count on from there. Leave it out; position_ids places tokens elsewhere."
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self._outputs(input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states)
        logits = self.get_output_embeddings()(kept(outputs.last_hidden_state, logits_to_keep))
        loss = (
            None
            if labels is None
            else self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
                ignore_index=ignore_index,
            )
        )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE_NAME: cache}
        )

    def _cache_of_call(self, given, use_cache: bool | None, attention_mask, position_ids) -> StudentCache | None:
        """The caller's, a new one, or none."""
        if given is not None and not isinstance(given, StudentCache):
            raise TypeError(
                f"The states of this model's mixers need its own cache, a StudentCache; got a {type(given).__name__}."
                f" Call without one and use_cache=True, and go on with the output's {CACHE_NAME}."
            )
        checkpointing = self.training and self.host.is_activation_checkpointing
        if checkpointing and (use_cache or given is not None):
            raise ValueError(
                "Gradient checkpointing runs layers twice, and a cache would see their tokens twice: use_cache=False,"
                " or eval()."
            )
        if (
            given is None and use_cache is None
        ):  # packed documents have no use for a cache, and with one they would not be told apart
            packed = attention_mask is None and position_ids is not None and documents_of(position_ids) is not None
            use_cache = self.config.use_cache and not self.training and not packed
        return StudentCache(self.config) if given is None and use_cache else given


def _refuse(others: dict) -> None:
    """Arguments that host models take, but mixers cannot honour, if they ask for anything; and unknown ones."""
    reasons = {
        "output_attentions": "a mixer has no attention weights",
        "is_causal": "a mixer cannot look ahead",
        "output_router_logits": "no layer routes",
    } | dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        "packed documents are told by position_ids that start anew",
    )
    for name, value in others.items():
        asks = value is False if name == "is_causal" else value is not None and value is not False
        if asks or (name not in reasons and value is not None):
            raise TypeError(f"A converted model does not take {name}: {reasons.get(name, 'it is unknown here')}.")


def kept(hidden: Tensor, which: int | Tensor) -> Tensor:
    """Of hidden states [B, T, D] the last so many (0: all), those at positions [N] of all rows or [B, N] of each, or
    where [B, T] is True."""
    if isinstance(which, int):
        return hidden[:, -which:] if which else hidden
    if which.ndim == 1:
        return hidden[:, which]
    return hidden[which] if which.dtype == torch.bool else hidden.take_along_dim(which[..., None], 1)


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module, or the slot, of a decoder layer."""
    return block.attention if "attention" in block._modules else block.self_attn


def projections_of(model: PreTrainedModel, layer: int) -> Projections:
    """Of the attention, or the mixer, of one layer."""
    host = model.host if isinstance(model, ConvertedForCausalLM) else model
    old, rotary = attention_of(host.base_model.layers[layer]), host.base_model.rotary_emb
    found = old.mixer.projections() if isinstance(old, Slot) else Projections.of(old, rotary)
    return dataclasses.replace(found, rotary_scale=rotary.attention_scaling)


@checked
@torch.no_grad()
def swap(
    model: PreTrainedModel,
    name: Literal[tuple(MIXERS)],
    options=None,
    layers: Sequence[Annotated[int, Range(0, 1000)]] | None = None,
    inputs: Sequence[Inputs] | None = None,
) -> ConvertedForCausalLM:
    """Replace the attention, or the mixer, of these layers (None: all) by the mixer `name`. The model given is
    consumed.

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
    if reason := refusal(host.config):
        raise UserError(f"swap(): {reason}")
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
        specs[layer] = {
            "name": name,
            "shape": dataclasses.asdict(projections.shape),
            "options": dataclasses.asdict(mixer.options),
        }
        setattr(blocks[layer], attention_name(host.config.model_type), Slot(mixer, layer))
    if config is None:
        config = ConvertedConfig(host.config, specs)
    else:
        config.mixers = specs
    student = ConvertedForCausalLM(config, host)
    student.generation_config = model.generation_config
    student.generation_config.cache_implementation = None  # the teacher's own cache means nothing to its student
    return student.train(model.training)


AutoConfig.register("converted", ConvertedConfig, exist_ok=True)
AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM, exist_ok=True)
