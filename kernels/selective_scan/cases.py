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
    "D-z-softplus": dict(G=2, R=2, D=True, z=True, bias=True),
    "everything": dict(G=2, R=2, D=True, z=True, bias=True, normalize=True, documents=True, state=True),
}


def make(
    L,
    N=5,
    G=1,
    R=1,
    D=False,
    z=False,
    bias=False,
    normalize=False,
    documents=False,
    state=False,
    decay=0.0,
    *,
    channels=6,
    dtype=torch.float64,
):
    """Arguments of selective_scan. B and C are positive where they make a denominator."""
    g = torch.Generator().manual_seed(L)
    normal = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    mapped = torch.exp if normalize else lambda t: t
    a = dict(
        u=normal(2, channels, L), delta=normal(2, channels, L) if bias else normal(2, channels, L).abs() + 0.1,
        A=-decay - normal(channels, N).abs(), B=mapped(normal(2, G, N, L)), C=mapped(normal(2, G * R, N, L)),
        delta_softplus=bias, normalize=normalize,
    )  # fmt: skip
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
    a = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in a.items()}
    if state and normalize:
        a["initial_state"] = tuple(h.to(dtype) for h in a["initial_state"])
    return a
