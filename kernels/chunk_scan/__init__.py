"""Chunk scan: a linear recurrence with one decay per head (Mamba-2, arXiv 2405.21060), which makes it matrix products.

batch · L time · H heads · P channels of a head · N state · G groups that share B · R queries per state
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_dense, check_documents, check_flags, check_tensors
from kernels.chunk_scan.chunked import chunk_scan_chunked
from kernels.chunk_scan.cpu import chunk_scan_cpu, why_unavailable
from kernels.chunk_scan.reference import chunk_scan_reference
from kernels.dispatch import Implementations, always_available, choose, why_no_triton, without_autocast
from kernels.mamba_ssm import chunk_scan_lacks, chunk_scan_mamba_ssm, why_no_mamba_ssm

EPSILON = 1e-6  # added to |den| (HedgeMamba, arXiv 2604.14191, Listing 2)


@overload
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    *,
    initial_states: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    normalize: bool = ...,
    impl: str = ...,
) -> Tensor: ...
@overload
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    *,
    initial_states: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    return_final_states: Literal[True],
    normalize: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    document_ids: Tensor | None = None,
    return_final_states: bool = False,
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y [batch, L, R H, P], and the final states [batch, H, N, P] if asked.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = C_t^T S_t, as mamba_ssm's `mamba_chunk_scan_combined` computes it.
    Results are computed in float32, or in float64 if x is; without `normalize`, "triton" multiplies bfloat16 as it is.

    Args:
        x: [batch, L, H, P].
        dt: [batch, L, H], already positive.
        A: [H], not positive.
        B: [batch, L, G, N], with G dividing H.
        C: [batch, L, G, N], or [batch, L, R H, N] ordered by head, for R queries per state (grouped-query attention).
        D: [R H] or [R H, P].
        initial_states: [batch, H, N, P], or P + 1 columns with `normalize`.
        document_ids: integers [batch, L]; the state starts anew where the id changes.
        return_final_states: whether the states after the last step are returned too.
        normalize: whether y = num / (|den| + 1e-6) before D, where den is the same recurrence driven by ones.
            States then have P + 1 columns, of which the last is that of den.
        impl: "triton", "cpu" (compiled), "chunked" (PyTorch operators), "reference", "mamba_ssm" (where that is
            installed; it multiplies float32 in TF32), or "auto": the first that runs, or what `kernels.bench` measured
            to be faster on this GPU.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, an A that is not finite, or an `impl` that cannot run.
    """
    check_flags(return_final_states=return_final_states, normalize=normalize)
    check_dense(dict(x=x, dt=dt, A=A, B=B, C=C), dict(D=D, initial_states=initial_states, document_ids=document_ids))
    _check_required(x, dt, A, B, C)
    _check_optional(x, dt, A, B, C, D, initial_states, document_ids, normalize)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if document_ids is not None:  # numbered by change, because an id that comes back is another document
        document_ids = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)).cumsum(1)
    lacks = chunk_scan_lacks(B.shape[2], C.shape[2], normalize)
    out_dtype, heads, implementation = x.dtype, x.shape[2], _choose(impl, x.device.type, dtype, lacks)
    if implementation == "mamba_ssm":
        with without_autocast(x.device.type):
            y, S = chunk_scan_mamba_ssm(x, dt, A, B, C, D, initial_states, document_ids)
        return (y, S) if return_final_states else y
    # Sums and states are in `dtype`. The factors of matrix products may be bfloat16, but not with a denominator, which
    # would cost more than 1e-2 of the gradients.
    bf16_products = implementation == "triton" and x.dtype == torch.bfloat16 and not normalize
    factor_dtype = torch.bfloat16 if bf16_products else dtype
    x, dt, A = (t.to(dtype) for t in (x, dt, A))
    B, C = (t.to(factor_dtype) for t in (B, C))
    C = C.unflatten(2, (min(heads, C.shape[2]), -1))  # of a group of B, or of a head
    values = torch.cat([x, torch.ones_like(x[..., :1])], -1) if normalize else x
    if initial_states is None:
        S = x.new_zeros(x.shape[0], heads, B.shape[-1], values.shape[-1])
    else:
        S = initial_states.to(dtype)
    with without_autocast(x.device.type):  # products of states stay in this dtype
        y, S = SCANS[implementation]((values * dt[..., None]).to(factor_dtype), dt * A, B, C, S, document_ids)
    if normalize:
        y = y[..., :-1] / (y[..., -1:].abs() + EPSILON)
    if D is not None:
        D = D.to(dtype)[:, None] if D.ndim == 1 else D.to(dtype)
        y = y + D.unflatten(0, (heads, -1)) * x[:, :, :, None]
    y = y.flatten(2, 3).to(out_dtype)
    return (y, S) if return_final_states else y


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kernels.chunk_scan.fused import chunk_scan_triton  # Triton is optional, and takes a second to import

    return chunk_scan_triton(*arguments)


IMPLEMENTATIONS: Implementations = {
    "triton": why_no_triton,
    "cpu": why_unavailable,
    "chunked": always_available,
    "reference": always_available,
}
SCANS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "triton": _triton,
    "cpu": chunk_scan_cpu,
    "chunked": chunk_scan_chunked,
    "reference": chunk_scan_reference,
}


@torch.compiler.assume_constant_result  # torch.compile does not trace into it
def _choose(impl: str, device: str, dtype: torch.dtype, lacks: str | None) -> str:
    theirs = functools.partial(why_no_mamba_ssm, operator="chunk_scan", lacks=lacks)
    return choose("chunk_scan", impl, device, dtype, IMPLEMENTATIONS | {"mamba_ssm": theirs})


def _check_required(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [batch, L, H, P], not empty; got {tuple(x.shape)}.")
    batch, L, H, _ = x.shape
    if dt.shape != (batch, L, H) or A.shape != (H,):
        raise ValueError(
            f"dt must be [batch, L, H] = {(batch, L, H)} and A [H]; got {tuple(dt.shape)} and {tuple(A.shape)}."
        )
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or t.shape[:2] != (batch, L) or t.shape[-1] != B.shape[-1]:
            raise ValueError(f"{name} must be [batch, L, groups, N] with batch {batch}, L {L}; got {tuple(t.shape)}.")
    if not B.shape[2] or not C.shape[2] or H % B.shape[2] or (C.shape[2] != B.shape[2] and C.shape[2] % H):
        raise ValueError(
            "The groups of B must divide H; those of C equal B's or a multiple of H; "
            f"got H {H}, B {B.shape[2]}, C {C.shape[2]}."
        )


def _check_optional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    document_ids: Tensor | None,
    normalize: bool,
) -> None:
    batch, L, H, P = x.shape
    outputs = max(H, C.shape[2])
    if D is not None and D.shape not in ((outputs,), (outputs, P)):
        raise ValueError(f"D must be {(outputs,)} or {(outputs, P)}; got {tuple(D.shape)}.")
    state = (batch, H, B.shape[-1], P + normalize)
    if initial_states is not None and initial_states.shape != state:
        raise ValueError(f"initial_states must be {state}; got {tuple(initial_states.shape)}.")
    check_tensors(dict(x=x, dt=dt, A=A, B=B, C=C, D=D, initial_states=initial_states), B.shape[-1])
    check_documents(document_ids, (batch, L), x.device)
    check_decay(A)
