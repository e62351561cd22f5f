"""HedgeMamba (arXiv 2604.14191, Listing 2): Mamba-1 whose B and C are Hedgehog features of keys and queries.

Order of operations: gate from x; x through the short convolution; from that Delta, B = phi(k), C = phi(q), u = v; scan with a
decay per channel and state; num / (|den| + 1e-6); + D u; gate; output projection. At the start it is the linear attention
it was made from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convert.mixers.base import Context, Mixer, State
from convert.mixers.parts import DecayRate, HedgehogHeads, ShortConv, TimeStep, open_gate
from convert.projections import Projections, Shape
from kernels.selective_scan import selective_scan


class Mamba(Mixer):
    """State: the last inputs of the convolution [B, conv - 1, D] and the scan's pair (num, den), each [B, G K, 2 K]."""

    @dataclass(frozen=True)
    class Options:
        conv: int = 4  # tokens (Mamba, arXiv 2312.00752)
        dt_rank: int | None = None  # None: a sixteenth of the width (Mamba)

    def __init__(self, shape: Shape, options: Options):
        super().__init__()
        self.shape, self.options = shape, options
        inner, kv_inner = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.conv = ShortConv(shape.width, options.conv)
        self.heads = HedgehogHeads(shape)
        self.time_step = TimeStep(shape.width, options.dt_rank or max(1, shape.width // 16), kv_inner)
        self.rate = DecayRate(kv_inner, 2 * shape.head_dim)
        self.skip = nn.Parameter(torch.zeros(inner))  # D
        self.gate = open_gate(shape.width, inner)

    @classmethod
    def from_projections(cls, projections: Projections, options: Options) -> "Mamba":
        mixer = cls(projections.shape, options)
        mixer.heads.copy_(projections)
        return mixer

    def projections(self) -> Projections:
        return self.heads.projections()

    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]:
        x, conv_state = self.conv(x_BTD, context.real, context.document_ids, None if state is None else state[0])
        q, k, v = self.heads(x, context.cos, context.sin)
        dt = self.time_step(x)
        if context.real is not None:
            dt = dt * context.real[..., None]  # padding neither adds to the state nor lets it decay
        y, last = selective_scan(
            v.flatten(2).mT, dt.mT, -self.rate(), k.permute(0, 2, 3, 1), q.permute(0, 2, 3, 1),
            self.skip, self.gate(x_BTD).mT, initial_state=None if state is None else state[1:], document_ids=context.document_ids,
            return_last_state=True, normalize=True,
        )  # fmt: skip
        return self.heads.out(y.mT.to(x_BTD.dtype)), (conv_state, *last)
