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
SIZES = (1, 1), (1, 7), (9, 1), (8, 8), (5, 13), (11, 17)  # height, width


def make(
    height: int,
    width: int,
    N: int = 5,
    D: bool = False,
    bias: bool = False,
    decay: float = 0.0,
    *,
    channels: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Make arguments of ss2d."""
    g = torch.Generator().manual_seed(height * width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    delta = normal(batch, 4, channels, height, width)
    a = dict(
        x=normal(batch, channels, height, width),
        delta=delta if bias else delta.abs() + 0.1,
        A=-decay - normal(4, channels, N).abs(),
        B=normal(batch, 4, N, height, width),
        C=normal(batch, 4, N, height, width),
        delta_softplus=bias,
    )
    if D:
        a["D"] = normal(4, channels)
    if bias:
        a["delta_bias"] = normal(4, channels)
    return a
