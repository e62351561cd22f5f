"""HedgeMamba with Mamba-2's decay (arXiv 2405.21060): one per key/value head, which makes the scan matrix products.

Everything else, and the exact start, is as in mamba.py.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from convert.core.fields import Range, check
from convert.mixers.base import Context, Mixer, State, StateSize
from convert.mixers.parts import NO_MAPS, DecayRate, MambaBlock, wide
from convert.mixers.projections import Projections, Shape
from kernels.chunk_scan import chunk_scan


class Mamba2(Mixer):
    """State: the last inputs of the convolution [B, conv - 1, D] and the sums [B, G, 2 K, K + 1]."""

    @dataclass(frozen=True)
    class Options:
        conv: Annotated[int, Range(1, 64)] = 4  # tokens (Mamba-2)
        dt_rank: Annotated[int, Range(1, 65_536)] | None = (
            None  # None: a sixteenth of the width, as in mamba (Mamba-2 itself projects directly)
        )

        __post_init__ = check

    decays = True

    def __init__(self, shape: Shape, options: Options):
        super().__init__()
        self.shape, self.options = shape, options
        self.block = MambaBlock(shape, options.conv, options.dt_rank, shape.num_kv_heads)
        self.rate = DecayRate(shape.num_kv_heads)

    @classmethod
    def inexact(cls, projections: Projections, options, tokens: int) -> str | None:
        return None if projections.feature_maps is not None else NO_MAPS

    @classmethod
    def from_projections(cls, projections: Projections, options: Options) -> "Mamba2":
        mixer = cls(projections.shape, options)
        mixer.block.heads.copy_(projections)
        return mixer

    def projections(self) -> Projections:
        return self.block.heads.projections()

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(
            fixed=4 * ((self.options.conv - 1) * s.width + s.num_kv_heads * 2 * s.head_dim * (s.head_dim + 1))
        )

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v, dt, skip, conv_state = self.block(x_BTD, context, None if state is None else state[0])
        y, sums = chunk_scan(
            v,
            dt,
            -self.rate(),
            k,
            q,
            skip.unflatten(0, (-1, self.shape.head_dim)),
            initial_states=None if state is None else state[1],
            document_ids=context.document_ids,
            return_final_states=True,
            normalize=True,
        )
        y = y.flatten(2) * F.silu(wide(self.block.gate(x_BTD)))
        return self.block.heads.out(y.to(x_BTD.dtype)), (conv_state, sums)
