"""Selective scan: a linear recurrence whose decay differs by channel and state (Mamba, arXiv 2312.00752, section 3).

batch · D channels · L time · N state · G groups that share B and C · P = D / G channels of a group · R readings of a state
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_documents, check_flags, check_plain, check_tensors
from kernels.dispatch import anywhere, pick, why_not_triton
from kernels.selective_scan.chunked import selective_scan_chunked
from kernels.selective_scan.cpu import selective_scan_cpu, why_not
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.update import selective_state_update

__all__ = ["selective_scan", "selective_state_update"]

EPSILON = 1e-6  # added to |den| (HedgeMamba, arXiv 2604.14191, Listing 2)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, *,
    initial_state=None, document_ids: Tensor | None = None, normalize: bool = False, impl: str = "auto",
):  # fmt: skip
    """y [batch, R D, L], and the last state if asked.

    The first ten arguments mean what they mean in mamba_ssm's `selective_scan_fn`: u, delta [batch, D, L]; A [D, N];
    B, C [batch, N, L] or [batch, G, N, L]; D [R D]; z [batch, R D, L]; delta_bias [D]. C may have R times the groups of
    B: then R readings of each state are returned, group by group (grouped-query attention).
    `document_ids` [batch, L]: the state starts anew where the id changes. `normalize`: y = num / (|den| + 1e-6) before D
    and z, where den is the same recurrence driven by ones; states are then pairs (num, den).
    States are [batch, D, N]. Computed in float32 (float64 if u is); `impl`: "auto", "triton", "cpu" (compiled), "chunked" (PyTorch operators) or
    "reference"; "auto" takes the first that runs here.
    """
    check_flags(delta_softplus=delta_softplus, return_last_state=return_last_state, normalize=normalize)
    states = _states(initial_state, normalize)
    check_plain(dict(u=u, delta=delta, A=A, B=B, C=C), dict(D=D, z=z, delta_bias=delta_bias, document_ids=document_ids) | states)
    _check(u, delta, A, B, C)
    _check_rest(u, delta, A, B, C, D, z, delta_bias, states, document_ids)
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
    scan = SCANS[_pick(impl, u.device.type, dtype)]
    with torch.autocast(u.device.type, enabled=False):  # products of states stay in this dtype
        y, h = scan(u, delta, A, B, C, h.to(dtype), starts)
    y = y[0] / (y[1].abs() + EPSILON) if normalize else y[0]
    if D is not None:
        y = y + D.to(dtype)[:, None] * _per_reading(u, B, C)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, tuple(h) if normalize else h[0]) if return_last_state else y


def _per_reading(u, B, C):
    """u repeated for each reading of its group: [batch, R D, L]."""
    G = B.shape[1]
    return u.unflatten(1, (G, 1, -1)).expand(-1, -1, C.shape[1] // G, -1, -1).flatten(1, 3)


def _triton(*arguments):
    from kernels.selective_scan.fused import selective_scan_triton  # Triton is optional, and takes a second to import

    return selective_scan_triton(*arguments)


WAYS = {"triton": why_not_triton, "cpu": why_not, "chunked": anywhere, "reference": anywhere}
SCANS = {"triton": _triton, "cpu": selective_scan_cpu, "chunked": selective_scan_chunked, "reference": selective_scan_reference}


@torch.compiler.assume_constant_result  # torch.compile does not look inside
def _pick(impl: str, device: str, dtype: torch.dtype) -> str:
    return pick("selective_scan", impl, device, dtype, WAYS)


def _states(initial_state, normalize: bool) -> dict[str, object]:
    """The initial states by name: one, or two with `normalize`."""
    if not normalize or initial_state is None:
        return {"initial_state": initial_state}
    if not isinstance(initial_state, tuple | list) or len(initial_state) != 2:
        got = tuple(initial_state.shape) if isinstance(initial_state, Tensor) else type(initial_state).__name__
        raise ValueError(f"initial_state must be a pair (num, den) with normalize=True; got {got}.")
    for part in initial_state:
        if not isinstance(part, Tensor):
            raise ValueError(f"initial_state must be a pair of tensors with normalize=True; got {type(part).__name__}.")
    return {f"initial_state of {name}": h for name, h in zip(("num", "den"), initial_state, strict=True)}


def _check_rest(u, delta, A, B, C, D, z, delta_bias, states, document_ids) -> None:
    batch, channels, L = u.shape
    groups_B, groups_C = (t.shape[1] if t.ndim == 4 else 1 for t in (B, C))
    outputs = channels * groups_C // groups_B
    expected = {
        "D": (D, (outputs,)), "z": (z, (batch, outputs, L)), "delta_bias": (delta_bias, (channels,)),
    } | {name: (h, (batch, *A.shape)) for name, h in states.items()}  # fmt: skip
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(t.shape)}.")
    check_tensors(dict(u=u, delta=delta, A=A, B=B, C=C) | {name: t for name, (t, _) in expected.items()}, A.shape[1])
    check_documents(document_ids, (batch, L), u.device)
    check_decay(A)


def _check(u, delta, A, B, C) -> None:
    if u.ndim != 3 or delta.shape != u.shape:
        raise ValueError(f"u and delta must both be [batch, D, L]; got {tuple(u.shape)} and {tuple(delta.shape)}.")
    batch, D, L = u.shape
    if L == 0 or batch == 0:
        raise ValueError(f"u must not be empty; got {tuple(u.shape)}.")
    if A.ndim != 2 or A.shape[0] != D:
        raise ValueError(f"A must be [D, N] with D = {D}; got {tuple(A.shape)}.")
    for name, t in (("B", B), ("C", C)):
        if t.ndim not in (3, 4) or t.shape[0] != batch or t.shape[-2:] != (A.shape[1], L):
            raise ValueError(
                f"{name} must be [batch, N, L] or [batch, G, N, L] with batch {batch}, N {A.shape[1]}, L {L}; got {tuple(t.shape)}."
            )
    groups_B, groups_C = (t.shape[1] if t.ndim == 4 else 1 for t in (B, C))
    if not groups_B or not groups_C or D % groups_B or groups_C % groups_B:
        raise ValueError(f"The groups of B must divide D and the groups of C; got D {D}, B {groups_B}, C {groups_C}.")
