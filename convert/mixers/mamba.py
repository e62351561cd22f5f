"""HedgeMamba (arXiv 2604.14191, Listing 2): Mamba-1 whose B and C are Hedgehog features of keys and queries.

Order of operations: gate from x; x through the short convolution; from that Delta, B = phi(k), C = phi(q), u = v; scan
with a decay per channel and state; num / (|den| + 1e-6); + D u; gate; output projection. At the start it is the linear
attention it was made from."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from convert.core.fields import Range, check
from convert.mixers.base import Context, Mixer, State, StateSize
from convert.mixers.parts import NO_MAPS, DecayRate, MambaBlock
from convert.mixers.projections import Projections, Shape
from kernels.selective_scan import selective_scan


class Mamba(Mixer):
    """State: the last inputs of the convolution [B, conv - 1, D] and the scan's pair (num, den), each [B, G K, 2 K]."""

    @dataclass(frozen=True)
    class Options:
        conv: Annotated[int, Range(1, 64)] = 4  # tokens (Mamba, arXiv 2312.00752)
        dt_rank: Annotated[int, Range(1, 65_536)] | None = None  # None: a sixteenth of the width (Mamba)

        __post_init__ = check

    decays = True

    def __init__(self, shape: Shape, options: Options):
        super().__init__()
        self.shape, self.options = shape, options
        kv_inner = shape.num_kv_heads * shape.head_dim
        self.block = MambaBlock(shape, options.conv, options.dt_rank, kv_inner)
        self.rate = DecayRate(kv_inner, 2 * shape.head_dim)

    @classmethod
    def inexact(cls, projections: Projections, options, tokens: int) -> str | None:
        return None if projections.feature_maps is not None else NO_MAPS

    @classmethod
    def from_projections(cls, projections: Projections, options: Options) -> "Mamba":
        mixer = cls(projections.shape, options)
        mixer.block.heads.copy_(projections)
        return mixer

    def projections(self) -> Projections:
        return self.block.heads.projections()

    def state_size(self) -> StateSize:
        s = self.shape
        return StateSize(
            fixed=4 * ((self.options.conv - 1) * s.width + 2 * s.num_kv_heads * s.head_dim * 2 * s.head_dim)
        )

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        q, k, v, dt, skip, conv_state = self.block(x_BTD, context, None if state is None else state[0])
        y, last = selective_scan(
            v.flatten(2).mT,
            dt.mT,
            -self.rate(),
            k.permute(0, 2, 3, 1),
            q.permute(0, 2, 3, 1),
            skip,
            self.block.gate(x_BTD).mT,
            initial_state=None if state is None else state[1:],
            document_ids=context.document_ids,
            return_last_state=True,
            normalize=True,
        )
        return self.block.heads.out(y.mT.to(x_BTD.dtype)), (conv_state, *last)
