"""HedgeMamba (arXiv 2604.14191, Listing 2): Mamba-1 whose B and C are Hedgehog features of keys and queries.

Order of operations: gate from x; x through the short convolution; from that Delta, B = phi(k), C = phi(q), u = v; scan
with a decay per channel and state; num / (|den| + 1e-6); + D u; gate; output projection. At the start it is the linear
attention it was made from."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from convert.core.fields import Checked, Range
from convert.mixers.base import AttentionShape, Context, Mixer, StateSize
from convert.mixers.mamba_block import DecayRate, MambaBlock
from kernels.selective_scan import selective_scan


class Mamba(Mixer):
    """Mamba-1 with a decay per channel and state."""

    @dataclass(frozen=True)
    class Options(Checked):
        conv: Annotated[int, Range(1, 64)] = 4  # tokens (Mamba, arXiv 2312.00752)
        dt_rank: Annotated[int, Range(1, 65_536)] | None = None  # None: a sixteenth of the width (Mamba)

    class State(NamedTuple):
        conv: Tensor  # [B, conv - 1, D]: the last inputs of the convolution
        numerator: Tensor  # [B, G K, 2 K]
        denominator: Tensor  # [B, G K, 2 K]

    decays = True

    def __init__(self, shape: AttentionShape, options: Options) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        kv_inner = shape.num_kv_heads * shape.head_dim
        self.block = MambaBlock(shape, options.conv, options.dt_rank, kv_inner)
        self.rate = DecayRate(kv_inner, 2 * shape.head_dim)

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(
            fixed_bytes=4 * ((self.options.conv - 1) * s.width + 2 * s.num_kv_heads * s.head_dim * 2 * s.head_dim)
        )

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v, dt, skip, conv_state = self.block(x_BTD, context, None if state is None else state.conv)
        y, last = selective_scan(
            v.flatten(2).mT,
            dt.mT,
            -self.rate(),
            k.permute(0, 2, 3, 1),
            q.permute(0, 2, 3, 1),
            skip,
            self.block.gate(x_BTD).mT,
            initial_state=None if state is None else (state.numerator, state.denominator),
            document_ids=context.document_ids,
            return_last_state=True,
            normalize=True,
        )
        return self.block.heads.out(y.mT.to(x_BTD.dtype)), self.State(conv_state, *last)

    @torch.no_grad()
    def set_decay(self, rate: float) -> None:
        self.rate.s.fill_(rate)

    def decay_per_token(self, x_BTD: Tensor, context: Context) -> Tensor:
        return (self.rate() * self.block.mean_time_step(x_BTD, context)[:, None]).flatten()

    def scan_updates(self) -> int:
        return 2 * self.rate.s.numel()  # numerators and denominators
