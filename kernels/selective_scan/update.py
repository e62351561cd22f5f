"""One step of the selective scan, for decoding: the state is changed in place."""

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.check import check_tensors
from kernels.pick import anywhere, pick, why_not_triton
from kernels.selective_scan.cpu import native, why_not

THREADED = 1 << 17  # state elements from which more than one thread pays (ours)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, *, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """out, shaped as x; `state` becomes the next one. All arguments as in mamba_ssm's `selective_state_update`.

    state [batch, D, N] or [batch, heads, P, N]; x, dt, z and out [batch, D] or [batch, heads, P]; A as state without the
    batch; B, C [batch, N] or [batch, G, N]; D, dt_bias as x without the batch. dt and A may be expanded views.
    Gradients are not defined: a decoding step. `impl`: "auto", "triton", "cpu" (compiled) or "reference".
    """
    arguments = _per_head(state, x, dt, A, B, C, D, z, dt_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        raise ValueError("selective_state_update has no gradients; call it under torch.no_grad(), or selective_scan to train.")
    step = STEPS[_pick(impl, state.device.type, state.dtype)]
    out = step(*arguments, dt_softplus).view(x.shape).to(x.dtype)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # a backward pass that saved it must not use what it became
    return out


def _per_head(state, x, dt, A, B, C, D, z, dt_bias) -> list[Tensor | None]:
    """The same with heads, checked."""
    if state.ndim not in (3, 4):
        raise ValueError(f"state must be [batch, D, N] or [batch, heads, P, N]; got {tuple(state.shape)}.")
    heads = state.ndim == 4
    batch, *channels, N = state.shape
    expected = {
        "x": (x, (batch, *channels)), "dt": (dt, (batch, *channels)), "A": (A, (*channels, N)), "D": (D, tuple(channels)),
        "z": (z, (batch, *channels)), "dt_bias": (dt_bias, tuple(channels)),
    }  # fmt: skip
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(t.shape)}.")
    groups = B.shape[1] if B.ndim == 3 else 1
    rows = (batch, N) if B.ndim == 2 else (batch, groups, N)
    for name, t in (("B", B), ("C", C)):
        if t.shape != rows or not groups or (channels[0] if heads else 1) % groups:
            raise ValueError(
                f"{name} must be {(batch, N)} or [{batch}, G, {N}], as the other, with G dividing the heads; got {tuple(t.shape)}."
            )
    check_tensors(dict(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias), N)
    if not state.is_contiguous():
        raise ValueError("state must be contiguous: it is changed in place.")
    if heads:
        first = [state, x, dt, A]
    else:
        first = [state[:, None], x[:, None], dt[:, None], A[None]]
    rest = [t if t is None or heads else t[None] for t in (D, dt_bias)]
    return [*first, *(t if t.ndim == 3 else t[:, None] for t in (B, C)), rest[0], z if z is None or heads else z[:, None], rest[1]]


def update_reference(state, x, dt, A, B, C, D, z, dt_bias, softplus: bool) -> Tensor:
    """The definition, in torch's operators and in the dtype of `state`."""
    x, dt, A, B, C = (t.to(state.dtype) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)
    B, C = (t.repeat_interleave(state.shape[1] // t.shape[1], 1)[:, :, None] for t in (B, C))
    state.copy_(torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B)
    y = (state * C).sum(-1)
    if D is not None:
        y = y + D * x
    return y if z is None else y * F.silu(z.to(state.dtype))


class _Update(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "heads", "dim", "groups", "states", "softplus", "threads")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "out")]


def update_cpu(state, x, dt, A, B, C, D, z, dt_bias, softplus: bool) -> Tensor:
    """As update_reference. A plain call outside torch.compile: a step lasts as long as a few dispatches."""
    if torch.compiler.is_compiling() or type(state) is not Tensor:  # fake tensors have no memory
        return torch.ops.workbench.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, softplus)
    return update_once(state, x, dt, A, B, C, D, z, dt_bias, softplus)


def update_once(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:  # fmt: skip
    dtype = state.dtype
    tensors = [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in (x, dt, A, B, C, D, z, dt_bias)
    ]
    out = torch.empty_like(tensors[0])
    batch, heads, dim, N = state.shape
    threads = torch.get_num_threads() if state.numel() >= THREADED else 1
    pointers = [None if t is None else t.data_ptr() for t in (state, *tensors, out)]
    u = _Update(batch, heads, dim, B.shape[1], N, softplus, threads, *pointers)
    (native().update_double if dtype == torch.float64 else native().update_float)(ctypes.byref(u))
    return out


def why_not_here(device: str, dtype: torch.dtype) -> str | None:
    """As the scan's; registers the step."""
    if (reason := why_not(device, dtype)) is None:
        _register()
    return reason


@functools.cache
def _register() -> None:
    update = torch.library.custom_op("workbench::selective_state_update", update_once, mutates_args=("state",), device_types="cpu")
    update.register_fake(lambda state, x, *rest: torch.empty_like(x, dtype=state.dtype, memory_format=torch.contiguous_format))


def _triton(*arguments):
    from kernels.selective_scan.fused_update import update_triton  # Triton is optional, and takes a second to import

    return update_triton(*arguments)


WAYS = {"triton": why_not_triton, "cpu": why_not_here, "reference": anywhere}
STEPS = {"triton": _triton, "cpu": update_cpu, "reference": update_reference}


@torch.compiler.assume_constant_result  # torch.compile does not look inside
def _pick(impl: str, device: str, dtype: torch.dtype) -> str:
    return pick("selective_state_update", impl, device, dtype, WAYS)
