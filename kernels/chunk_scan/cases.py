"""Arguments on which every implementation is compared with float64: in the tests here, and on a GPU where there is one."""

import torch

CASES = {
    "plain": {},
    "groups": dict(G=2),
    "readings": dict(G=2, R=3),
    "initial-state": dict(state=True),
    "documents": dict(documents=True, state=True),
    "strong-decay": dict(decay=100.0),
    "normalized": dict(normalize=True),
    "normalized-readings-state": dict(normalize=True, R=2, state=True),
    "D": dict(G=2, R=2, D="channel"),
    "everything": dict(G=2, R=2, D="head", normalize=True, documents=True, state=True),
}
HEADS, CHANNELS = 4, 3


def make(L, N=5, G=1, R=1, D=None, normalize=False, documents=False, state=False, decay=0.0, *, dtype=torch.float64):
    """Arguments of chunk_scan. B and C are positive where they make a denominator; C has B's groups where R is 1."""
    g = torch.Generator().manual_seed(L)
    normal = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    mapped = torch.exp if normalize else lambda t: t
    a = dict(
        x=normal(2, L, HEADS, CHANNELS), dt=normal(2, L, HEADS).abs() + 0.1, A=-decay - normal(HEADS).abs(),
        B=mapped(normal(2, L, G, N)), C=mapped(normal(2, L, G if R == 1 else R * HEADS, N)),
    )  # fmt: skip
    if D:
        a["D"] = normal(R * HEADS, CHANNELS) if D == "channel" else normal(R * HEADS)
    if state:
        S = normal(2, HEADS, N, CHANNELS)
        a["initial_states"] = torch.cat([S, S[..., :1].abs() + 1], -1) if normalize else S
    a = {k: v.to(dtype) for k, v in a.items()}
    if documents:
        a["document_ids"] = (torch.rand(2, L, generator=g) < 0.1).cumsum(1) + 7
    return a | dict(normalize=normalize)
