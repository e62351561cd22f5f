"""Arguments on which the tests compare every implementation with float64."""

import torch
from torch import Tensor

CASES: dict[str, dict] = {
    "plain": {},
    "groups": dict(G=2),
    "heads": dict(G=4),
    "queries": dict(G=2, R=3),
    "initial-state": dict(state=True),
    "documents": dict(documents=True, state=True),
    "strong-decay": dict(decay=100.0),
    "normalized": dict(normalize=True),
    "normalized-queries-state": dict(normalize=True, R=2, state=True),
    "D": dict(G=2, R=2, D="channel"),
    "everything": dict(G=2, R=2, D="head", normalize=True, documents=True, state=True),
}
HEADS, CHANNELS = 4, 3


def make(
    L: int,
    N: int = 5,
    G: int = 1,
    R: int = 1,
    D: str | None = None,
    normalize: bool = False,
    documents: bool = False,
    state: bool = False,
    decay: float = 0.0,
    *,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Make arguments of chunk_scan for batch 2; B and C are positive where they make a denominator.

    Args:
        R: queries per state; where it is 1, C has the groups of B.
        D: "head" or "channel" for a D of that shape.
    """
    g = torch.Generator().manual_seed(L)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def positive(t: Tensor) -> Tensor:
        return torch.exp(t) if normalize else t

    a = dict(
        x=normal(2, L, HEADS, CHANNELS),
        dt=normal(2, L, HEADS).abs() + 0.1,
        A=-decay - normal(HEADS).abs(),
        B=positive(normal(2, L, G, N)),
        C=positive(normal(2, L, G if R == 1 else R * HEADS, N)),
    )
    if D:
        a["D"] = normal(R * HEADS, CHANNELS) if D == "channel" else normal(R * HEADS)
    if state:
        S = normal(2, HEADS, N, CHANNELS)
        a["initial_states"] = torch.cat([S, S[..., :1].abs() + 1], -1) if normalize else S
    a = {k: v.to(dtype) for k, v in a.items()}
    if documents:
        a["document_ids"] = (torch.rand(2, L, generator=g) < 0.1).cumsum(1) + 7
    return a | dict(normalize=normalize)
