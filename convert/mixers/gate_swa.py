"""Gated sliding-window attention: Attention Editing's GateSWA (arXiv 2604.05688), with the gate of Qwen's gated
attention (arXiv 2505.06708) and the attention sinks of StreamingLLM (arXiv 2309.17453).

y = (softmax attention to the last `window` tokens and the first `sinks` of the document) * sigmoid(W x + b), then the
output projection.

B batch · T tokens of this call · S slots of the window · H query heads · G key/value heads · K head size
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.parts import QKV, wide

EMPTY = -1.0  # the place of what is not there: padding, or a slot that nothing fills yet


class GateSWA(Mixer):
    """Softmax attention to a window and to the first tokens of a document, behind a sigmoid gate."""

    @dataclass(frozen=True)
    class Options(Checked):
        """`gate_bias`: b at the start, where W is 0. The output projection is divided by sigmoid(b), so that the
        function does not change: 0 is a gate half open, 4 one that is nearly open and learns slowly (ours: the paper
        does not say)."""

        window: Annotated[int, Range(1, 1e7)] = 512  # tokens, the one that looks included (ours)
        sinks: Annotated[int, Range(0, 65_536)] = 4  # StreamingLLM's
        gate: Literal["element", "head", "none"] = "element"  # head: one number per head
        gate_bias: Annotated[float, Range(-10, 10)] = 0.0

    class State(NamedTuple):
        keys: Tensor  # [B, S, G, K], S up to window - 1 + sinks
        values: Tensor  # [B, S, G, K]
        places: Tensor  # [B, S]: the place of each in its document

    model_dtype_fields = ("keys", "values")
    dials = {
        "keep": ("every:4", "every:6", "auto:4", "auto:6"),
        "gate": ("element", "head", "none"),
    }

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        self.slots = options.window - 1 + options.sinks
        self.qkv = QKV(shape)
        inner = shape.num_heads * shape.head_dim
        size = {"element": inner, "head": shape.num_heads, "none": 0}[options.gate]
        self.gate = nn.Linear(shape.width, size) if size else None
        self.out = nn.Linear(inner, shape.width, bias=shape.out_bias)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, options.gate_bias)

    @classmethod
    def tiny(cls, options: Options, seq_len: int) -> Options:
        return replace(options, window=min(options.window, seq_len // 2))

    @classmethod
    def sequence_problem(cls, options: Options, seq_len: int) -> str | None:
        if options.window < seq_len:
            return None
        return (
            "a window must be shorter than the training sequences, or its end is never seen; it is"
            f" {options.window:,}, they are {seq_len:,}. Lower window, or raise --seq-len."
        )

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(elements_per_token=2 * s.num_kv_heads * s.head_dim, bytes_per_token=4, window=self.slots)

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v = self.qkv(x_BTD, context.cos, context.sin)
        q, k = q.to(v.dtype), k.to(v.dtype)  # their norms leave them in float32
        starts = state is None
        if state is None:
            empty = k[:, :0]
            state = self.State(empty, empty, wide(k.new_full(empty.shape[:2], EMPTY)))
        keys = torch.cat([state.keys.to(k.dtype), k], 1)
        values = torch.cat([state.values.to(v.dtype), v], 1)
        places, documents = _locate(state.places, x_BTD, context)
        seen = functools.partial(self._seen, places, q.shape[1])
        # at the start of a sequence places follow from the context alone
        blocks = context.once((self.options.window, self.options.sinks), seen) if starts else seen()
        y = self._attend(q, keys, values, places, documents, blocks).flatten(2)
        if self.gate is not None:
            gate = torch.sigmoid(self.gate(x_BTD))
            y = (y.unflatten(2, (gate.shape[2], -1)) * gate[..., None]).flatten(2)
        return self.out(y), self._keep(keys, values, places, documents)

    def _seen(self, places: Tensor, length: int) -> list[Tensor]:
        """The keys, in order, that any query of a block may see, for each block."""
        slots, device = places.shape[1] - length, places.device
        block, before = self._block(length), torch.arange(slots + length, device=device)
        if block == length:
            return [before]
        kept = ((before < slots) | ((places >= 0) & (places < self.options.sinks)).any(0)).nonzero()[:, 0]
        starts = torch.arange(slots, slots + length, block, device=device)
        nearest = (starts - (self.options.window - 1) - _holes(places[:, slots:])).clamp(min=0)
        bounds = torch.stack([nearest, torch.searchsorted(kept, nearest)], 1).tolist()
        return [
            torch.cat([kept[:earlier], before[first : slots + start + block]])
            for start, (first, earlier) in zip(range(0, length, block), bounds, strict=True)
        ]

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, places: Tensor, documents: Tensor, blocks: list[Tensor]
    ) -> Tensor:
        """[B, T, H, K]: each block of queries to the keys of its block: nothing is T x T."""
        slots, done, start = keys.shape[1] - q.shape[1], [], 0
        for part, seen in zip(q.split(self._block(q.shape[1]), 1), blocks, strict=True):
            done.append(self._attend_to(part, keys, values, places, documents, seen, slots + start))
            start += part.shape[1]
        return done[0] if len(done) == 1 else torch.cat(done, 1)

    def _block(self, length: int) -> int:
        """How many of so many queries attend together."""
        block = max(self.options.window, 64)
        return block if length > 2 * block else length

    def _attend_to(
        self, q: Tensor, keys: Tensor, values: Tensor, places: Tensor, documents: Tensor, seen: Tensor, start: int
    ) -> Tensor:
        """Queries that begin at `start` among the keys, to the keys `seen`."""
        mine = torch.arange(start, start + q.shape[1], device=q.device)
        at, of = places[:, mine, None], places[:, None, seen]
        visible = (of >= 0) & (of <= at) & ((at - of < self.options.window) | (of < self.options.sinks))
        visible &= documents[:, mine, None] == documents[:, None, seen]
        visible |= mine[:, None] == seen  # padding sees itself, or its softmax would be of nothing
        k, v = (t[:, seen].transpose(1, 2) for t in (keys, values))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible[:, None], enable_gqa=True)
        return y.transpose(1, 2)

    def _keep(self, keys: Tensor, values: Tensor, places: Tensor, documents: Tensor) -> State:
        """The next state: of the last document its sinks and the latest window - 1 others, in the order of the text
        behind the empty slots."""
        places = torch.where(documents == documents[:, -1:], places, EMPTY)
        sink = (places >= 0) & (places < self.options.sinks)
        chosen = torch.where(sink, math.inf, places).topk(min(self.slots, places.shape[1]), 1).indices
        kept, order = places.gather(1, chosen).sort(1)
        chosen = chosen.gather(1, order)[..., None, None].expand(-1, -1, *keys.shape[2:])
        there = (kept >= 0)[..., None, None]
        return self.State(keys.gather(1, chosen) * there, values.gather(1, chosen) * there, kept)


def _locate(old: Tensor, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return of the slots and then of this call's tokens, [B, S + T]: the place in the document (EMPTY: none), and a
    number of the document."""
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if context.padding_mask is None else context.padding_mask
    seen = real.float().cumsum(1)
    documents = torch.zeros_like(seen)
    # of the tokens seen, how many belong to earlier documents
    before = -(F.pad(old, (1, 0), value=EMPTY).amax(1, keepdim=True) + 1).expand_as(seen)
    if context.document_ids is not None:
        starts = F.pad(context.document_ids.diff(dim=1) != 0, (1, 0))
        documents = starts.float().cumsum(1)
        before = torch.where(starts, seen - real.float(), before).cummax(1).values
    places = torch.where(real, seen - 1 - before, EMPTY)
    return torch.cat([old, places], 1), torch.cat([torch.zeros_like(old), documents], 1)


def _holes(places: Tensor) -> Tensor:
    """How many padded tokens a row has after its first real one, at most: they come between a token and its window."""
    real = places >= 0
    return (~real & (real.cumsum(1) > 0)).sum(1).max()
