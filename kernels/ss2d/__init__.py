"""Selective scan over images: four scans over the places of an image, along rows and columns, forwards and backwards
(VMamba's SS2D, arXiv 2401.10166), with a decay per channel and state, or with a transition of low rank (DLRMamba, arXiv
2603.06920).

batch · D channels · H height · W width · N state · r rank
4 directions: rows, columns, rows backwards, columns backwards
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_dense, check_flags, check_tensors
from kernels.dispatch import Implementations, always_available, choose, why_no_triton, without_autocast
from kernels.ss2d.chunked import ss2d_chunked
from kernels.ss2d.cpu import ss2d_cpu, why_unavailable
from kernels.ss2d.doubling import ss2d_doubling
from kernels.ss2d.lowrank import ss2d_lowrank_chunked
from kernels.ss2d.lowrank_cpu import ss2d_lowrank_cpu
from kernels.ss2d.lowrank_cpu import why_unavailable as why_no_lowrank_cpu
from kernels.ss2d.reference import DIRECTIONS, ss2d_lowrank_reference, ss2d_reference

__all__ = ["DIRECTIONS", "ss2d", "ss2d_lowrank"]


def _triton(*arguments: Tensor) -> Tensor:
    from kernels.ss2d.fused import ss2d_triton  # Triton is optional, and takes a second to import

    return ss2d_triton(*arguments)


def _lowrank_triton(*arguments: Tensor | None) -> Tensor:
    from kernels.ss2d.fused import ss2d_lowrank_triton

    return ss2d_lowrank_triton(*arguments)


MAX_RANK = 32  # of the Triton kernels: more does not fit in registers
SCANS: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    "cpu": ss2d_cpu,
    "chunked": ss2d_chunked,
    "doubling": ss2d_doubling,
    "reference": ss2d_reference,
}
IMPLEMENTATIONS: Implementations = {
    "triton": why_no_triton,
    "cpu": why_unavailable,
    "chunked": always_available,
    "doubling": always_available,
    "reference": always_available,
}
LOWRANK_SCANS: dict[str, Callable[..., Tensor]] = {
    "triton": _lowrank_triton,
    "cpu": ss2d_lowrank_cpu,
    "chunked": ss2d_lowrank_chunked,
    "reference": ss2d_lowrank_reference,
}


def ss2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return y [batch, D, H, W], the sum of four scans.

    In each direction, over its places t: h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t, y_t = C_t . h_t + D x_t, with
    h = 0 before the first. All of a direction is given at the places of the image, not in its order. Results are
    computed in float32, or in float64 if x is, and fastest where channels are next to each other in memory
    (torch.channels_last).

    Args:
        x: [batch, D, H, W].
        delta: [batch, 4, D, H, W].
        A: [4, D, N].
        B, C: [batch, 4, N, H, W].
        D: [4, D].
        delta_bias: [4, D].
        delta_softplus: whether delta is softplus(delta + delta_bias).
        impl: "triton", "cpu" (compiled), "chunked" (PyTorch operators), "doubling" (few and fixed ones, for
            torch.export), "reference", or "auto": the first that runs.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, an A that is not finite, or an `impl` that cannot run.
    """
    check_flags(delta_softplus=delta_softplus)
    check_dense(dict(x=x, delta=delta, A=A, B=B, C=C), dict(D=D, delta_bias=delta_bias))
    _check_shapes(x, delta, A, B, C, D, delta_bias)
    dtype, out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype
    x, delta, A, B, C = (t.to(dtype) for t in (x, delta, A, B, C))
    delta = _positive(delta, delta_bias, delta_softplus)
    scan = SCANS[_choose(impl, x.device.type, dtype)]
    with without_autocast(x.device.type):  # products of states stay in this dtype
        y = scan(x, delta, A, B, C)
    return _with_skip(y, x, D).to(out_dtype)


def ss2d_lowrank(
    x: Tensor,
    U: Tensor,
    sigma: Tensor,
    V: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return y [batch, D, H, W], the sum of four scans whose transition is a matrix of rank r.

    In each direction, over its places t: h_t = U diag(sigma) V^T h_{t-1} + delta_t x_t B_t, y_t = C_t . h_t + D x_t,
    with h = 0 before the first (DLRMamba, arXiv 2603.06920, eq. 5, whose B x is delta B x here, as in VMamba). What a
    channel costs depends on r, whatever N is. With orthonormal columns in U and V and sigma below 1 no state grows;
    that is left to the caller. Results are computed in float32, or in float64 if x is.

    Args:
        x: [batch, D, H, W].
        U, V: [4, N, r].
        sigma: [4, r].
        B, C: [batch, 4, N, H, W].
        D: [4, D].
        delta: [batch, 4, D, H, W]; 1 where there is none.
        delta_bias: [4, D].
        delta_softplus: whether delta is softplus(delta + delta_bias).
        impl: "triton" (a rank of at most 32), "cpu" (compiled), "chunked" (PyTorch operators), "reference", or "auto":
            the first that runs.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, a rank above N, or an `impl` that cannot run.
    """
    check_flags(delta_softplus=delta_softplus)
    check_dense(dict(x=x, U=U, sigma=sigma, V=V, B=B, C=C), dict(D=D, delta=delta, delta_bias=delta_bias))
    _check_lowrank_shapes(x, U, sigma, V, B, C, D, delta, delta_bias, delta_softplus)
    dtype, out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype
    x, U, sigma, V, B, C = (t.to(dtype) for t in (x, U, sigma, V, B, C))
    if delta is not None:
        delta = _positive(delta.to(dtype), delta_bias, delta_softplus)
    scan = LOWRANK_SCANS[_choose_lowrank(impl, x.device.type, dtype, U.shape[2])]
    with without_autocast(x.device.type):  # products of states stay in this dtype
        y = scan(x, delta, U, sigma, V, B, C)
    return _with_skip(y, x, D).to(out_dtype)


def _positive(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    delta = delta if bias is None else delta + bias.to(delta.dtype)[..., None, None]
    return F.softplus(delta) if softplus else delta


def _with_skip(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + D.to(y.dtype).sum(0)[:, None, None] * x


@torch.compiler.assume_constant_result
def _choose(impl: str, device: str, dtype: torch.dtype) -> str:
    """Return the implementation's name; torch.compile calls this, which may compile C++, and keeps the result."""
    return choose("ss2d", impl, device, dtype, IMPLEMENTATIONS)


@torch.compiler.assume_constant_result
def _choose_lowrank(impl: str, device: str, dtype: torch.dtype, rank: int) -> str:
    def why_no_triton_for_rank(device: str, dtype: torch.dtype) -> str | None:
        too_many = f"it takes a rank of at most {MAX_RANK}, not {rank}" if rank > MAX_RANK else None
        return why_no_triton(device, dtype) or too_many

    implementations: Implementations = {
        "triton": why_no_triton_for_rank,
        "cpu": why_no_lowrank_cpu,
        "chunked": always_available,
        "reference": always_available,
    }
    return choose("ss2d_lowrank", impl, device, dtype, implementations)


def _check_shapes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    _check_image(x)
    if A.ndim != 3 or A.shape[:2] != (DIRECTIONS, x.shape[1]):
        raise ValueError(f"A must be [4, D, N] with D = {x.shape[1]}; got {tuple(A.shape)}.")
    check_tensors(dict(x=x, A=A, delta=delta, B=B, C=C, D=D, delta_bias=delta_bias), A.shape[2])
    _check_places(x, A.shape[2], dict(delta=delta, B=B, C=C, D=D, delta_bias=delta_bias))
    check_decay(A)


def _check_lowrank_shapes(
    x: Tensor, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> None:  # fmt: skip
    _check_image(x)
    if U.ndim != 3 or U.shape[0] != DIRECTIONS or V.shape != U.shape or sigma.shape != (DIRECTIONS, U.shape[2]):
        raise ValueError(
            f"U and V must be [4, N, r], and sigma [4, r]; got {tuple(U.shape)}, {tuple(V.shape)} and"
            f" {tuple(sigma.shape)}."
        )
    if U.shape[2] > U.shape[1]:
        raise ValueError(f"The rank must be at most N; got a rank of {U.shape[2]} for N = {U.shape[1]}.")
    if delta is None and delta_bias is not None:
        raise ValueError("delta_bias is added to delta; there is none.")
    if delta is None and softplus:
        raise ValueError("delta_softplus is of delta; there is none.")
    check_tensors(dict(x=x, U=U, sigma=sigma, V=V, B=B, C=C, D=D, delta=delta, delta_bias=delta_bias), U.shape[1])
    _check_places(x, U.shape[1], dict(delta=delta, B=B, C=C, D=D, delta_bias=delta_bias))


def _check_image(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, D, H, W]; got {tuple(x.shape)}.")


def _check_places(x: Tensor, states: int, tensors: dict[str, Tensor | None]) -> None:
    batch, channels, *places = x.shape
    wanted = dict.fromkeys(("B", "C"), (batch, DIRECTIONS, states, *places))
    wanted |= dict.fromkeys(("D", "delta_bias"), (DIRECTIONS, channels)) | {"delta": (batch, DIRECTIONS, *x.shape[1:])}
    for name, t in tensors.items():
        if t is not None and t.shape != wanted[name]:
            raise ValueError(f"{name} must be {wanted[name]} to fit the others; got {tuple(t.shape)}.")
