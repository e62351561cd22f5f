"""Selective scan: a linear recurrence whose decay differs by channel and state (Mamba, arXiv 2312.00752, section 3).

batch · D channels · L time · N state · G groups that share B and C · P = D / G · R queries per state
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_dense, check_documents, check_flags, check_tensors
from kernels.dispatch import Implementations, always_available, choose, why_no_triton, without_autocast
from kernels.mamba_ssm import needs_gradients, selective_scan_lacks, selective_scan_mamba_ssm, why_no_mamba_ssm
from kernels.selective_scan.chunked import selective_scan_chunked
from kernels.selective_scan.cpu import selective_scan_cpu, why_unavailable
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.update import selective_state_update

__all__ = ["selective_scan", "selective_state_update"]

EPSILON = 1e-6  # added to |den| (HedgeMamba, arXiv 2604.14191, Listing 2)
State: TypeAlias = Tensor | tuple[Tensor, Tensor]  # [batch, D, N], or a pair (num, den) of them with normalize=True


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    *,
    initial_state: State | None = ...,
    document_ids: Tensor | None = ...,
    normalize: bool = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    *,
    return_last_state: Literal[True],
    initial_state: State | None = ...,
    document_ids: Tensor | None = ...,
    normalize: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, State]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: State | None = None,
    document_ids: Tensor | None = None,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    """Return y [batch, R D, L], and the last state if asked.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t. The first ten arguments mean what they mean in
    mamba_ssm's `selective_scan_fn`. Results are computed in float32, or in float64 if u is.

    Args:
        u, delta: [batch, D, L].
        A: [D, N].
        B: [batch, N, L] or [batch, G, N, L].
        C: as B; or R times as many groups, for R queries per state, group by group (grouped-query attention).
        D: [R D].
        z: [batch, R D, L].
        delta_bias: [D].
        delta_softplus: whether delta is softplus(delta + delta_bias).
        return_last_state: whether the state after the last step is returned too.
        initial_state: [batch, D, N]; with `normalize`, a pair (num, den) of such states.
        document_ids: integers [batch, L]; the state starts anew where the id changes.
        normalize: whether y = num / (|den| + 1e-6) before D and z, where den is the same recurrence driven by ones.
        impl: "triton", "cpu" (compiled), "chunked" (PyTorch operators), "reference", "mamba_ssm" (where that is
            installed), or "auto": the first that runs, or what `kernels.bench` measured to be faster on this GPU.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, an A that is not finite, or an `impl` that cannot run.
    """
    check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state, normalize=normalize)
    states = _initial_states(initial_state, normalize)
    check_dense(
        dict(u=u, delta=delta, A=A, B=B, C=C), dict(D=D, z=z, delta_bias=delta_bias, document_ids=document_ids) | states
    )
    _check_required(u, delta, A, B, C)
    _check_optional(u, delta, A, B, C, D, z, delta_bias, states, document_ids)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    out_dtype = u.dtype
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    B, C = (t[:, None] if t.ndim == 3 else t for t in (B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    if initial_state is None:
        h = u.new_zeros(1 + normalize, *u.shape[:2], A.shape[1])
    else:
        h = torch.stack([h.to(dtype) for h in states.values()])
    starts = None
    if document_ids is not None:
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    tensors = u, delta, A, B, C, *states.values()
    lacks = selective_scan_lacks(
        A.shape[1], C.shape[1] // B.shape[1], initial_state is not None, starts is not None, normalize,
        return_last_state and needs_gradients(*tensors),
    )  # fmt: skip
    scan = SCANS[_choose(impl, u.device.type, dtype, lacks)]
    with without_autocast(u.device.type):  # products of states stay in this dtype
        outputs, h = scan(u, delta, A, B, C, h.to(dtype), starts)
    y = outputs[0] / (outputs[1].abs() + EPSILON) if normalize else outputs[0]
    if D is not None:
        y = y + D.to(dtype)[:, None] * _repeat_per_query(u, B, C)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, tuple(h) if normalize else h[0]) if return_last_state else y


def _repeat_per_query(u: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Repeat u for each query of its group: [batch, R D, L]."""
    G = B.shape[1]
    return u.unflatten(1, (G, 1, -1)).expand(-1, -1, C.shape[1] // G, -1, -1).flatten(1, 3)


def _triton(*arguments: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    from kernels.selective_scan.fused import selective_scan_triton  # Triton is optional, and takes a second to import

    return selective_scan_triton(*arguments)


IMPLEMENTATIONS: Implementations = {
    "triton": why_no_triton,
    "cpu": why_unavailable,
    "chunked": always_available,
    "reference": always_available,
}
SCANS: dict[str, Callable[..., tuple[tuple[Tensor, ...], Tensor]]] = {
    "triton": _triton,
    "cpu": selective_scan_cpu,
    "chunked": selective_scan_chunked,
    "reference": selective_scan_reference,
    "mamba_ssm": selective_scan_mamba_ssm,
}


@torch.compiler.assume_constant_result  # torch.compile does not trace into it
def _choose(impl: str, device: str, dtype: torch.dtype, lacks: str | None) -> str:
    theirs = functools.partial(why_no_mamba_ssm, operator="selective_scan", lacks=lacks)
    return choose("selective_scan", impl, device, dtype, IMPLEMENTATIONS | {"mamba_ssm": theirs})


def _initial_states(initial_state: object, normalize: bool) -> dict[str, Any]:
    """Return the initial states by name: one, or two with `normalize`."""
    if not normalize or initial_state is None:
        return {"initial_state": initial_state}
    if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
        got = tuple(initial_state.shape) if isinstance(initial_state, Tensor) else type(initial_state).__name__
        raise ValueError(f"initial_state must be a pair (num, den) with normalize=True; got {got}.")
    for part in initial_state:
        if not isinstance(part, Tensor):
            raise ValueError(f"initial_state must be a pair of tensors with normalize=True; got {type(part).__name__}.")
    return {f"initial_state of {name}": h for name, h in zip(("num", "den"), initial_state, strict=True)}


def _check_required(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must both be [batch, D, L]; got {tuple(u.shape)} and {tuple(delta.shape)}.")
    batch, D, L = u.shape
    if L == 0 or batch == 0:
        raise ValueError(f"u must not be empty; got {tuple(u.shape)}.")
    if A.ndim != 2 or A.shape[0] != D:
        raise ValueError(f"A must be [D, N] with D = {D}; got {tuple(A.shape)}.")
    N = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.ndim not in (3, 4) or t.shape[0] != batch or t.shape[-2:] != (N, L):
            raise ValueError(
                f"{name} must be [batch, N, L] or [batch, G, N, L] with batch {batch}, N {N}, L {L}; "
                f"got {tuple(t.shape)}."
            )
    groups_B, groups_C = (t.shape[1] if t.ndim == 4 else 1 for t in (B, C))
    if not groups_B or not groups_C or D % groups_B or groups_C % groups_B:
        raise ValueError(f"The groups of B must divide D and the groups of C; got D {D}, B {groups_B}, C {groups_C}.")


def _check_optional(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    states: dict[str, Any],
    document_ids: Tensor | None,
) -> None:
    batch, channels, L = u.shape
    groups_B, groups_C = (t.shape[1] if t.ndim == 4 else 1 for t in (B, C))
    outputs = channels * groups_C // groups_B
    expected = {"D": (D, (outputs,)), "z": (z, (batch, outputs, L)), "delta_bias": (delta_bias, (channels,))}
    expected |= {name: (h, (batch, *A.shape)) for name, h in states.items()}
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(t.shape)}.")
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C) | {name: t for name, (t, _) in expected.items()}
    check_tensors(tensors, A.shape[1])
    check_documents(document_ids, (batch, L), u.device)
    check_decay(A)
