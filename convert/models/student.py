"""The converted model: a transformers host whose attention modules are slots for mixers.

B batch · T tokens of this call · D width
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from convert.mixers import MIXERS
from convert.mixers.base import AttentionShape
from convert.mixers.families import attention_name
from convert.models.cache import CACHE_NAME, CACHE_NAMES, StudentCache, check_cache
from convert.models.config import ConvertedConfig
from convert.models.positions import documents_of, follows, locate
from convert.models.slot import Call, Slot, attention_of

OF_THE_SEARCH = ("tokenizer", "assistant_tokenizer")  # arguments of generate()


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

    def __init__(self, config: ConvertedConfig, host: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.host = AutoModelForCausalLM.from_config(config.host) if host is None else host
        config.host = self.host.config
        for layer, (block, spec) in enumerate(zip(self.blocks, config.mixers, strict=True)):
            if spec is not None and not isinstance(attention_of(block), Slot):
                kind = MIXERS[spec["name"]]
                mixer = kind(AttentionShape(**spec["shape"]), kind.Options(**spec["options"]))
                setattr(block, attention_name(config.host.model_type), Slot(mixer, layer))
        if host is None:
            self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass  # every part starts as its constructor leaves it; a host built here is about to be loaded

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as in transformers, and then compare one token decoded with the cache to a full pass."""
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

    def get_input_embeddings(self) -> nn.Module:
        return self.host.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.host.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.host.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.host.set_output_embeddings(value)

    def hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StudentCache | None = None,
    ) -> Tensor:
        """The last hidden states [B, T, D], after the final norm. See `locate` for positions, padding and documents."""
        return self._outputs(input_ids, attention_mask, position_ids, inputs_embeds, cache, False).last_hidden_state

    def _outputs(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StudentCache | None,
        output_hidden_states: bool | list[int],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give input_ids or inputs_embeds, one of the two.")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is not None:
            cache.check(x.shape[0], len(self.config.mixers))
        positions, mask, document_ids = locate(x, attention_mask, position_ids, cache, self.config.keeps_attention)
        dummy = x.new_zeros(1, 1, 1, 1)  # a four-dimensional mask is handed on untouched: without attention, none T x T
        outputs = self.host.base_model(
            inputs_embeds=x,
            attention_mask=attention_mask if self.config.keeps_attention else dummy,
            position_ids=positions,
            use_cache=cache is not None,
            call=Call(mask, document_ids, cache),
            output_hidden_states=output_hidden_states,
            output_attentions=False,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
        if cache is not None:
            cache.count(positions, mask)
        return outputs

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate as in transformers, with the cache of this model, which no other can replace."""

        def setting(name: str) -> Any:
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

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs of one step without what the search alone uses, which transformers hands on to the model too."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in OF_THE_SEARCH}

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: StudentCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, cache: StudentCache | None = None,
        output_hidden_states: bool | list[int] | None = None, num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None, ignore_index: int = -100, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """The forward pass of a causal language model of transformers. `past_key_values` and `cache` name one
        argument. `others` are refused if they ask for anything; `cache_position`, if it says anything but what follows
        from the cache."""
        # not in the signature, for which transformers would make one at each step
        cache_position = others.pop("cache_position", None)
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

    def _cache_of_call(
        self, given: Any, use_cache: bool | None, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> StudentCache | None:
        """The caller's cache, a new one, or none."""
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
        if given is None and use_cache is None:
            # packed documents have no use for a cache, and with one they would not be told apart
            packed = attention_mask is None and position_ids is not None and documents_of(position_ids) is not None
            use_cache = self.config.use_cache and not self.training and not packed
        return StudentCache(self.config) if given is None and use_cache else given


def _refuse(others: dict[str, Any]) -> None:
    """Raise where an argument asks for what mixers cannot do, though host models take it, or is unknown."""
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
    """The hidden states [B, T, D] whose logits are wanted: the last `which` (0: all), those at positions [N] of all
    rows or [B, N] of each, or where [B, T] is True."""
    if isinstance(which, int):
        return hidden[:, -which:] if which else hidden
    if which.ndim == 1:
        return hidden[:, which]
    return hidden[which] if which.dtype == torch.bool else hidden.take_along_dim(which[..., None], 1)


AutoModelForCausalLM.register(ConvertedConfig, ConvertedForCausalLM, exist_ok=True)
