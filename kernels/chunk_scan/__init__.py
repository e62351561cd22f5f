"""Chunk scan: a linear recurrence with one decay per head (Mamba-2, arXiv 2405.21060), which makes it matrix products.

batch · L time · H heads · P channels of a head · N state · G groups that share B · R readings of a state
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_documents, check_flags, check_plain, check_tensors
from kernels.chunk_scan.chunked import chunk_scan_chunked
from kernels.chunk_scan.cpu import chunk_scan_cpu, why_not
from kernels.chunk_scan.reference import chunk_scan_reference
from kernels.dispatch import anywhere, pick, why_not_triton

EPSILON = 1e-6  # added to |den| (HedgeMamba, arXiv 2604.14191, Listing 2)


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, initial_states: Tensor | None = None,
    document_ids: Tensor | None = None, return_final_states: bool = False, normalize: bool = False, impl: str = "auto",
):  # fmt: skip
    """y [batch, L, R H, P], and the final states [batch, H, N, P] if asked.

    As mamba_ssm's `mamba_chunk_scan_combined`: x [batch, L, H, P]; dt [batch, L, H], already positive; A [H], not
    positive; B [batch, L, G, N] with G dividing H; D [R H] or [R H, P]. C [batch, L, G, N] or, for R readings of each
    state (grouped-query attention), [batch, L, R H, N] ordered by head.
    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T, y_t = C_t^T S_t. `document_ids` [batch, L]: the state starts anew where the
    id changes. `normalize`: y = num / (|den| + 1e-6) before D, where den is the same recurrence driven by ones; it is
    the last of then P + 1 columns of the states.
    Computed in float32 (float64 if x is; without `normalize`, "triton" multiplies bfloat16 as it is); `impl`: "auto", "triton",
    "cpu" (compiled), "chunked" (PyTorch operators) or "reference"; "auto" takes the first that runs here.
    """
    check_flags(return_final_states=return_final_states, normalize=normalize)
    check_plain(dict(x=x, dt=dt, A=A, B=B, C=C), dict(D=D, initial_states=initial_states, document_ids=document_ids))
    _check(x, dt, A, B, C)
    _check_rest(x, dt, A, B, C, D, initial_states, document_ids, normalize)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out_dtype, heads, way = x.dtype, x.shape[2], _pick(impl, x.device.type, dtype)
    # of the matrix products; sums and states are in `dtype`. A denominator in bfloat16 would cost more than 1e-2 of the gradients
    factors = torch.bfloat16 if way == "triton" and x.dtype == torch.bfloat16 and not normalize else dtype
    x, dt, A = (t.to(dtype) for t in (x, dt, A))
    B, C = (t.to(factors) for t in (B, C))
    B = B.repeat_interleave(heads // B.shape[2], 2)
    if C.shape[2] < heads:
        C = C.repeat_interleave(heads // C.shape[2], 2)
    C = C.unflatten(2, (heads, -1))
    values = torch.cat([x, torch.ones_like(x[..., :1])], -1) if normalize else x
    S = x.new_zeros(x.shape[0], heads, B.shape[-1], values.shape[-1]) if initial_states is None else initial_states.to(dtype)
    if document_ids is not None:  # numbered by change: an id that comes back is another document
        document_ids = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)).cumsum(1)
    with torch.autocast(x.device.type, enabled=False):  # products of states stay in this dtype
        y, S = SCANS[way]((values * dt[..., None]).to(factors), dt * A, B, C, S, document_ids)
    if normalize:
        y = y[..., :-1] / (y[..., -1:].abs() + EPSILON)
    if D is not None:
        D = D.to(dtype)[:, None] if D.ndim == 1 else D.to(dtype)
        y = y + D.unflatten(0, (heads, -1)) * x[:, :, :, None]
    y = y.flatten(2, 3).to(out_dtype)
    return (y, S) if return_final_states else y


def _triton(*arguments):
    from kernels.chunk_scan.fused import chunk_scan_triton  # Triton is optional, and takes a second to import

    return chunk_scan_triton(*arguments)


WAYS = {"triton": why_not_triton, "cpu": why_not, "chunked": anywhere, "reference": anywhere}
SCANS = {"triton": _triton, "cpu": chunk_scan_cpu, "chunked": chunk_scan_chunked, "reference": chunk_scan_reference}


@torch.compiler.assume_constant_result  # torch.compile does not look inside
def _pick(impl: str, device: str, dtype: torch.dtype) -> str:
    return pick("chunk_scan", impl, device, dtype, WAYS)


def _check_rest(x, dt, A, B, C, D, initial_states, document_ids, normalize) -> None:
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


def _check(x, dt, A, B, C) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be [batch, L, H, P], not empty; got {tuple(x.shape)}.")
    batch, L, H, _ = x.shape
    if dt.shape != (batch, L, H) or A.shape != (H,):
        raise ValueError(f"dt must be [batch, L, H] = {(batch, L, H)} and A [H]; got {tuple(dt.shape)} and {tuple(A.shape)}.")
    for name, t in (("B", B), ("C", C)):
        if t.ndim != 4 or t.shape[:2] != (batch, L) or t.shape[-1] != B.shape[-1]:
            raise ValueError(f"{name} must be [batch, L, groups, N] with batch {batch}, L {L}; got {tuple(t.shape)}.")
    if not B.shape[2] or not C.shape[2] or H % B.shape[2] or (C.shape[2] != B.shape[2] and C.shape[2] % H):
        raise ValueError(
            f"The groups of B must divide H; those of C equal B's or a multiple of H; got H {H}, B {B.shape[2]}, C {C.shape[2]}."
        )
