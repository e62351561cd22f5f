"""Arguments on which the tests compare every implementation with float64."""

import torch
from torch import Tensor

CASES: dict[str, dict] = {
    "plain": {},
    "one-state": dict(N=1),
    "many-states": dict(N=21),
    "many-channels": dict(channels=37, N=8),
    "strong-decay": dict(decay=100.0),
    "D-softplus": dict(D=True, bias=True),
}
LOWRANK_CASES: dict[str, dict] = {
    "plain": dict(r=2),
    "rank-one": dict(r=1),
    "full-rank": dict(r=5),
    "one-state": dict(N=1, r=1),
    "no-memory": dict(r=2, sigma=0.0),
    "many-channels": dict(N=18, r=17, channels=70),
    "delta-D-softplus": dict(N=8, r=3, D=True, bias=True),
}
SIZES = (1, 1), (1, 7), (9, 1), (8, 8), (5, 13), (11, 17)  # height, width


def make(
    height: int,
    width: int,
    N: int = 5,
    D: bool = False,
    bias: bool = False,
    decay: float = 0.0,
    *,
    r: int | None = None,
    sigma: float = 0.95,
    channels: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Make arguments of ss2d; with a rank r those of ss2d_lowrank, with singular values of at most `sigma`, and with a
    delta where there is a bias of it."""
    g = torch.Generator().manual_seed(height * width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    delta = normal(batch, 4, channels, height, width)
    a = dict(x=normal(batch, channels, height, width))
    if r is None:
        a |= dict(delta=delta if bias else delta.abs() + 0.1, A=-decay - normal(4, channels, N).abs())
    else:
        U, V = (torch.linalg.qr(normal(4, N, r))[0] for _ in range(2))
        a |= dict(U=U, sigma=sigma * torch.rand(4, r, generator=g, dtype=torch.float64), V=V)
    a |= dict(B=normal(batch, 4, N, height, width), C=normal(batch, 4, N, height, width))
    if D:
        a["D"] = normal(4, channels)
    if bias:
        a |= dict(delta=delta, delta_bias=normal(4, channels))
    return {name: t.to(dtype) for name, t in a.items()} | dict(delta_softplus=bias)
