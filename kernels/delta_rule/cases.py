"""Arguments on which the tests compare every implementation with float64."""

import torch
from torch import Tensor

CASES: dict[str, dict] = {
    "plain": {},
    "grouped-values": dict(q=2, k=2),
    "grouped-queries": dict(k=2, v=1),
    "initial-state": dict(state=True),
    "documents": dict(documents=True, state=True),
    "strong-decay": dict(decay=100.0),
    "weak-decay": dict(decay=0.0),
    "no-memory": dict(forget=0.1, state=True),
    "beta-of-0-1-and-2": dict(whole_beta=True),
    "more-values": dict(K=19, V=37, state=True),
    "more-keys": dict(K=33, V=16),
    "large-heads": dict(K=70, V=66, k=2, state=True),
    "one-key": dict(K=1),
    "everything": dict(q=2, k=1, v=2, documents=True, state=True, decay=5.0),
}
HEADS, VALUES = 4, 3


def make(
    T: int,
    K: int = 5,
    V: int = VALUES,
    q: int = HEADS,
    k: int = HEADS,
    v: int = HEADS,
    decay: float = 1.0,
    forget: float = 0.0,
    whole_beta: bool = False,
    documents: bool = False,
    state: bool = False,
    per_channel: bool = True,
    *,
    dtype: torch.dtype = torch.float64,
) -> dict:
    """Make arguments of `kda`, or of `gated_delta_rule` without `per_channel`, for batch 2.

    Args:
        q, k, v: their numbers of heads.
        decay: how strong decays are; at 0, all of about 1e-3.
        forget: the share of decays that are complete, with a logarithm of -infinity.
        whole_beta: whether betas are 0, 1 and 2.
    """
    generator = torch.Generator().manual_seed(T)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    a = dict(
        q=normal(2, T, q, K),
        k=torch.nn.functional.normalize(normal(2, T, k, K), dim=-1),
        v=normal(2, T, v, V),
        g=-(decay + 1e-3) * normal(2, T, HEADS, *((K,) if per_channel else ())).abs(),
        beta=normal(2, T, HEADS).sigmoid(),
    )
    if forget:
        a["g"][torch.rand(a["g"].shape, generator=generator) < forget] = -torch.inf
    if whole_beta:
        a["beta"] = torch.randint(3, a["beta"].shape, generator=generator).double()
    if state:
        a["initial_state"] = normal(2, HEADS, K, V)
    a = {name: t.to(dtype) for name, t in a.items()}
    if documents:
        a["document_ids"] = (torch.rand(2, T, generator=generator) < 0.1).cumsum(1) + 7
    return a
