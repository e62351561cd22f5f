"""Hedgehog linear attention: stage 1 of "Attention to Mamba" (arXiv 2604.14191, section 3.1).

y_t = sum_s phi_q(q_t).phi_k(k_s) v_s / sum_s phi_q(q_t).phi_k(k_s), s <= t, on rotated queries and keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.hedgehog import HedgehogHeads
from kernels.chunk_scan import chunk_scan


class LinearAttention(Mixer):
    """Linear attention with Hedgehog features, normalised by the sum of its weights."""

    @dataclass(frozen=True)
    class Options:
        pass

    class State(NamedTuple):
        sums: Tensor  # [B, G, 2 K, K + 1]: of phi(k) v, and of phi(k) in the last column

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        self.heads = HedgehogHeads(shape)

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(fixed_bytes=4 * s.num_kv_heads * 2 * s.head_dim * (s.head_dim + 1))

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v = self.heads(x_BTD, context.cos, context.sin)
        heads = self.shape.num_kv_heads
        counts = x_BTD.new_ones(x_BTD.shape[:2]) if context.padding_mask is None else context.padding_mask
        y, sums = chunk_scan(
            v, counts.float()[..., None].expand(-1, -1, heads), torch.zeros(heads, device=v.device), k,
            q, initial_states=None if state is None else state.sums, document_ids=context.document_ids,
            return_final_states=True, normalize=True,
        )  # fmt: skip
        return self.heads.out(y.flatten(2).to(x_BTD.dtype)), self.State(sums)
