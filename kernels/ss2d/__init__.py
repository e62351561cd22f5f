"""Selective scan over images: four scans over the places of an image, along rows and columns, forwards and backwards
(VMamba's SS2D, arXiv 2401.10166).

batch · D channels · H height · W width · N state · 4 directions: rows, columns, rows backwards, columns backwards
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_dense, check_flags, check_tensors
from kernels.dispatch import Implementations, always_available, choose
from kernels.ss2d.chunked import ss2d_chunked
from kernels.ss2d.cpu import ss2d_cpu, why_unavailable
from kernels.ss2d.reference import DIRECTIONS, ss2d_reference

__all__ = ["DIRECTIONS", "ss2d"]

SCANS = {"cpu": ss2d_cpu, "chunked": ss2d_chunked, "reference": ss2d_reference}
IMPLEMENTATIONS: Implementations = {
    "cpu": why_unavailable,
    "chunked": always_available,
    "reference": always_available,
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
        impl: "cpu" (compiled), "chunked" (PyTorch operators), "reference", or "auto": the first that runs.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, an A that is not finite, or an `impl` that cannot run.
    """
    check_flags(delta_softplus=delta_softplus)
    check_dense(dict(x=x, delta=delta, A=A, B=B, C=C), dict(D=D, delta_bias=delta_bias))
    _check_shapes(x, delta, A, B, C, D, delta_bias)
    dtype, out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32, x.dtype
    x, delta, A, B, C = (t.to(dtype) for t in (x, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[..., None, None]
    if delta_softplus:
        delta = F.softplus(delta)
    scan = SCANS[_choose(impl, x.device.type, dtype)]
    with torch.autocast(x.device.type, enabled=False):  # products of states stay in this dtype
        y = scan(x, delta, A, B, C)
    if D is not None:
        y = y + D.to(dtype).sum(0)[:, None, None] * x
    return y.to(out_dtype)


@torch.compiler.assume_constant_result
def _choose(impl: str, device: str, dtype: torch.dtype) -> str:
    """Return the implementation's name; torch.compile calls this, which may compile C++, and keeps the result."""
    return choose("ss2d", impl, device, dtype, IMPLEMENTATIONS)


def _check_shapes(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
) -> None:
    tensors: dict[str, Tensor | None] = dict(x=x, delta=delta, A=A, B=B, C=C, D=D, delta_bias=delta_bias)
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, D, H, W]; got {tuple(x.shape)}.")
    batch, channels, height, width = x.shape
    if A.ndim != 3 or A.shape[:2] != (DIRECTIONS, channels):
        raise ValueError(f"A must be [4, D, N] with D = {channels}; got {tuple(A.shape)}.")
    check_tensors(tensors, A.shape[2])
    wanted = {
        "delta": (batch, DIRECTIONS, channels, height, width),
        "B": (batch, DIRECTIONS, A.shape[2], height, width),
        "C": (batch, DIRECTIONS, A.shape[2], height, width),
        "D": (DIRECTIONS, channels),
        "delta_bias": (DIRECTIONS, channels),
    }
    for name, shape in wanted.items():
        t = tensors[name]
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {shape} to fit x and A; got {tuple(t.shape)}.")
    check_decay(A)
