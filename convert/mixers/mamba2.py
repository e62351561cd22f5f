"""HedgeMamba with Mamba-2's decay (arXiv 2405.21060): one per key/value head, which makes the scan matrix products.

Everything else, and the exact start, is as in mamba.py.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.mamba_block import DecayRate, MambaBlock
from convert.mixers.parts import wide
from kernels.chunk_scan import chunk_scan


class Mamba2(Mixer):
    """Mamba-2 with a decay per key/value head."""

    @dataclass(frozen=True)
    class Options(Checked):
        conv: Annotated[int, Range(1, 64)] = 4  # tokens (Mamba-2)
        # None: a sixteenth of the width, as in mamba (Mamba-2 itself projects directly)
        dt_rank: Annotated[int, Range(1, 65_536)] | None = None

    class State(NamedTuple):
        conv: Tensor  # [B, conv - 1, D]: the last inputs of the convolution
        sums: Tensor  # [B, G, 2 K, K + 1]: of phi(k) v, and of phi(k) in the last column

    decays = True

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        self.block = MambaBlock(shape, options.conv, options.dt_rank, shape.num_kv_heads)
        self.rate = DecayRate(shape.num_kv_heads)

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(
            fixed_bytes=4 * ((self.options.conv - 1) * s.width + s.num_kv_heads * 2 * s.head_dim * (s.head_dim + 1))
        )

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v, dt, skip, conv_state = self.block(x_BTD, context, None if state is None else state.conv)
        y, sums = chunk_scan(
            v,
            dt,
            -self.rate(),
            k,
            q,
            skip.unflatten(0, (-1, self.shape.head_dim)),
            initial_states=None if state is None else state.sums,
            document_ids=context.document_ids,
            return_final_states=True,
            normalize=True,
        )
        y = y.flatten(2) * F.silu(wide(self.block.gate(x_BTD)))
        return self.block.heads.out(y.to(x_BTD.dtype)), self.State(conv_state, sums)

    @torch.no_grad()
    def set_decay(self, rate: float) -> None:
        self.rate.s.fill_(rate)

    def decay_per_token(self, x_BTD: Tensor, context: Context) -> Tensor:
        return self.rate() * self.block.mean_time_step(x_BTD, context)
