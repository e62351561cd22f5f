"""Arguments on which the tests compare every implementation with float64."""

import torch
from torch import Tensor

CASES: dict[str, dict] = {
    "plain": {},
    "groups": dict(G=2),
    "queries": dict(G=2, R=3),
    "initial-state": dict(state=True),
    "documents": dict(documents=True, state=True),
    "strong-decay": dict(decay=100.0),
    "normalized": dict(normalize=True),
    "normalized-queries-state": dict(normalize=True, R=2, state=True),
    "D-z-softplus": dict(G=2, R=2, D=True, z=True, bias=True),
    "everything": dict(G=2, R=2, D=True, z=True, bias=True, normalize=True, documents=True, state=True),
}
UPDATE_CASES: dict[str, dict] = {
    "plain": {},
    "odd": dict(N=21),
    "one": dict(N=1),
    "all": dict(D=True, z=True, dt_bias=True),
    "heads": dict(heads=4, G=2, D=True),
}


def make(
    L: int,
    N: int = 5,
    G: int = 1,
    R: int = 1,
    D: bool = False,
    z: bool = False,
    bias: bool = False,
    normalize: bool = False,
    documents: bool = False,
    state: bool = False,
    decay: float = 0.0,
    *,
    channels: int = 6,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Make arguments of selective_scan for batch 2; B and C are positive where they make a denominator."""
    g = torch.Generator().manual_seed(L)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def positive(t: Tensor) -> Tensor:
        return torch.exp(t) if normalize else t

    a = dict(
        u=normal(2, channels, L),
        delta=normal(2, channels, L) if bias else normal(2, channels, L).abs() + 0.1,
        A=-decay - normal(channels, N).abs(),
        B=positive(normal(2, G, N, L)),
        C=positive(normal(2, G * R, N, L)),
        delta_softplus=bias,
        normalize=normalize,
    )
    if D:
        a["D"] = normal(R * channels)
    if z:
        a["z"] = normal(2, R * channels, L)
    if bias:
        a["delta_bias"] = normal(channels)
    if documents:
        a["document_ids"] = (torch.rand(2, L, generator=g) < 0.1).cumsum(1) + 7
    if state:
        h = normal(2, channels, N)
        a["initial_state"] = (h, h.abs() + 1) if normalize else h
    a = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in a.items()}
    if state and normalize:
        a["initial_state"] = tuple(h.to(dtype) for h in a["initial_state"])
    return a


def make_update(
    N: int = 16, G: int | None = None, heads: int | None = None, dtype: torch.dtype = torch.float64, **present: bool
) -> dict:
    """Make arguments of selective_state_update: batch 2, and 6 channels or heads of 3.

    Args:
        present: which of the optional D, z and dt_bias there are.
    """
    g = torch.Generator().manual_seed(N)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    channels = (heads, 3) if heads else (6,)
    rows = (2, G, N) if G else (2, N)
    a = dict(
        state=normal(2, *channels, N),
        x=normal(2, *channels),
        dt=normal(2, *channels),
        A=-normal(*channels, N).abs(),
        B=normal(*rows),
        C=normal(*rows),
    )
    optional = [name for name in ("D", "z", "dt_bias") if present.get(name)]
    a |= {name: normal(*((2, *channels) if name == "z" else channels)) for name in optional}
    return a | dict(dt_softplus=True)
