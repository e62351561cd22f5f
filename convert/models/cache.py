"""The cache of a converted model: states of mixers beside keys and values of kept layers.

B batch · T tokens of this call
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, __version__
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from convert.core.errors import UserError
from convert.mixers import MIXERS
from convert.mixers.families import layer_window

# The cache's name in transformers 5.24 and later, in 5.23, and in gpt_neox's layers
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
_OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME = next(name for name in CACHE_NAMES if name in _OUTPUTS)
CHECKED_TOKENS = 4  # in check_cache (ours)


class StateLayer(CacheLayerMixin):
    """What one mixer carries from call to call: its state, a NamedTuple of tensors with the batch first, of which the
    fields `model_dtype_fields` have the dtype of the model."""

    is_sliding = False
    is_compileable = False

    def __init__(self, model_dtype_fields: tuple[str, ...]) -> None:
        super().__init__()
        self.model_dtype_fields = model_dtype_fields
        self.state: Any = None

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        raise TypeError("A mixer's state is set by its slot, not by keys and values.")

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> None:
        self.lazy_initialization(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state._make(t.index_select(0, indices.to(t.device)) for t in self.state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state._make(t.repeat_interleave(repeats, 0) for t in self.state)

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "A recurrent state cannot be rolled back, so this cache cannot be cropped; generate without an assistant"
            " model."
        )


class StudentCache(Cache):
    """States of the mixers, keys and values of the kept layers, and the number of real tokens seen, per row."""

    is_compileable = False

    def __init__(self, config: PreTrainedConfig) -> None:
        host = config.host_config()
        windows = [layer_window(host, i) for i in range(len(config.mixers))]
        super().__init__(
            layers=[
                (
                    StateLayer(MIXERS[mixer["name"]].model_dtype_fields)
                    if mixer is not None
                    else DynamicSlidingWindowLayer(window)
                    if window
                    else DynamicLayer()
                )
                for mixer, window in zip(config.mixers, windows, strict=True)
            ]
        )
        self.seen = 0
        self.rows: Tensor | None = None  # [B]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The length and the offset of the keys that a kept layer sees; transformers asks at whichever layer comes
        first."""
        layer = self.layers[layer_idx]
        return (self.seen + query_length, 0) if isinstance(layer, StateLayer) else layer.get_mask_sizes(query_length)

    def check(self, rows: int, layers: int) -> None:
        """Raise unless the batch has as many rows, and the model as many layers, as those that filled the cache."""
        if len(self.layers) != layers or (self.rows is not None and len(self.rows) != rows):
            held = f"{len(self.layers)} layers and {rows if self.rows is None else len(self.rows)} rows"
            raise ValueError(
                f"A cache goes on with the model and the batch that filled it: it holds {held}, and was given {layers}"
                f" and {rows}."
            )

    def count(self, positions: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of a call that had these positions [B, T]. Padding alone counts for nothing."""
        self.seen += positions.shape[1]
        rows = positions[:, -1] + 1
        if padding_mask is not None:
            rows = torch.where(padding_mask.any(1), rows, 0 if self.rows is None else self.rows)
        self.rows = rows

    def crop(self, *args: Any) -> None:
        for layer in self.layers:  # a mixer refuses; before any kept layer has been cropped
            if isinstance(layer, StateLayer):
                layer.crop(*args)
        super().crop(*args)

    def reset(self) -> None:
        super().reset()
        self.seen, self.rows = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.rows is not None:
            self.rows = self.rows.index_select(0, beam_idx.to(self.rows.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows = None if self.rows is None else self.rows.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.rows = None if self.rows is None else self.rows.index_select(0, indices)

    def num_bytes(self) -> int:
        """The size of all that it holds: states, convolution inputs, keys and values."""
        return sum(layer_bytes(layer) for layer in self.layers)


def layer_bytes(layer: CacheLayerMixin, dtype: torch.dtype | None = None) -> int:
    """The size of one layer of a cache, ours or transformers'. Keys, values and latents count as `dtype` (None: as they
    are), sums and convolution inputs are always float32."""
    if isinstance(layer, StateLayer):
        state = {} if layer.state is None else layer.state._asdict()
        castable = [t for name, t in state.items() if name in layer.model_dtype_fields]
        fixed = [t for name, t in state.items() if name not in layer.model_dtype_fields]
    else:
        castable, fixed = [layer.keys, layer.values] if layer.is_initialized else [], []
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in castable) + sum(
        t.numel() * t.element_size() for t in fixed
    )


@torch.no_grad()
def check_cache(model: nn.Module) -> None:
    """Raises unless one token decoded with the cache gives the logits of a full pass: a transformers that hands a layer
    its cache in a way that this code does not know would otherwise write other text without a word. Draws no random
    numbers, leaves training mode as it is, and skips a model whose weights are not there yet."""
    offloaded = any(
        place not in ("meta", torch.device("meta")) for place in (getattr(model, "hf_device_map", None) or {}).values()
    )
    # ds_id: a part of it, by DeepSpeed
    if any(hasattr(p, "ds_id") or (p.is_meta and not offloaded) for p in model.parameters()):
        return
    device = None if offloaded else model.get_input_embeddings().weight.device
    ids = torch.arange(CHECKED_TOKENS, device=device)[None] % model.config.vocab_size
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        whole = model(ids, use_cache=False).logits[0, -1].float()
        cache = model(ids[:, :-1], use_cache=True)[CACHE_NAME]
        cached = model(ids[:, -1:], use_cache=True, **{CACHE_NAME: cache}).logits[0, -1].float()
    finally:
        for module in training:
            module.training = True
    eps = torch.finfo(model.dtype).eps
    allowed = eps**0.5 * whole.std() + 4 * eps * whole.abs().max()
    difference = (cached - whole).square().mean().sqrt()
    if whole.isfinite().all() and not difference <= allowed:
        raise UserError(
            f"One token decoded with the cache must give the logits of a full pass; they differ by {difference:.2g}"
            f" (allowed {allowed:.2g}) under transformers {__version__}, which this model's code does not fit. Install"
            " the version in its config.json."
        )
