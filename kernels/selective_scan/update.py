"""One step of the selective scan, for decoding: the state is changed in place."""

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_dense, check_flags, check_tensors
from kernels.cpp_build import require_library
from kernels.dispatch import Implementations, always_available, choose, why_no_triton
from kernels.mamba_ssm import update_mamba_ssm, why_no_mamba_ssm
from kernels.selective_scan.cpu import SOURCE, compiled_library, why_unavailable

MIN_THREADED = 1 << 17  # state elements from which more than one thread is faster (ours)
CPP_ARGUMENTS = struct.Struct("=17q")  # `Update` of update.h: sizes, then addresses


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    impl: str = "auto",
) -> Tensor:
    """Advance `state` by one step in place, and return the output, shaped as x.

    All arguments mean what they mean in mamba_ssm's `selective_state_update`. It has no gradients.

    Args:
        state: [batch, D, N] or [batch, heads, P, N], contiguous.
        x, dt, z: [batch, D] or [batch, heads, P]; dt may be an expanded view.
        A: as state, without the batch; it may be an expanded view.
        B, C: [batch, N] or [batch, G, N].
        D, dt_bias: as x, without the batch.
        dt_softplus: whether dt is softplus(dt + dt_bias).
        impl: "triton", "cpu" (compiled), "reference", "mamba_ssm" (where that is installed), or "auto": the first that
            runs, or what `kernels.bench` measured to be faster on this GPU.

    Raises:
        ValueError: for wrong types, shapes, dtypes or devices, for an A that is not finite, for tensors that need
            gradients, or if `impl` cannot run here.
    """
    tensors = state, x, dt, A, B, C, D, z, dt_bias
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise ValueError(
            "selective_state_update has no gradients; call it under torch.no_grad(), or selective_scan to train."
        )
    check_flags(dt_softplus=dt_softplus)
    in_memory = type(state) is Tensor and not torch.compiler.is_compiling()  # a fake tensor has no memory
    layout = _layout(impl, tensors) if in_memory else None
    known = KNOWN_CALLS.get(layout) if in_memory else None
    out = _call_compiled(tensors, *known, dt_softplus) if known else None
    if out is None:
        arguments = _add_heads(*tensors)
        implementation = _choose(impl, state.device.type, state.dtype)
        if implementation != "cpu":  # the compiled step checks A itself
            check_decay(A)
        out = UPDATES[implementation](*arguments, dt_softplus).view(x.shape).to(x.dtype)
        if in_memory and implementation == "cpu":
            _remember(layout, state, tensors, groups=B.shape[1] if B.ndim == 3 else 1)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # so that a backward pass that saved the old state notices
    return out


# A step takes as long as reading some thirty attributes of a tensor, so the result of the checks is remembered: the
# layout of all arguments -> the function, its sizes, and whether to use threads. It holds layouts that the compiled
# step reads in place.
KNOWN_CALLS: dict[tuple | None, tuple[Callable, tuple[int, ...], bool]] = {}
MAX_KNOWN_CALLS = 256
PLAIN = (Tensor, torch.nn.Parameter)


def _layout(impl: str, tensors: tuple[Tensor | None, ...]) -> tuple:
    """Return all that decides how the arguments are read; anything but a plain tensor is represented by its type."""
    layouts = [_tensor_layout(t) if type(t) in PLAIN else type(t) for t in tensors]
    return impl if isinstance(impl, str) else type(impl), *layouts


def _tensor_layout(t: Tensor) -> tuple:
    strided = t.layout is torch.strided and not t.is_nested
    return (t.shape, t.dtype, t.is_cpu, t.is_contiguous()) if strided else (t.layout,)


def _remember(layout: tuple | None, state: Tensor, tensors: tuple[Tensor | None, ...], groups: int) -> None:
    in_place = (t is None or (type(t) in PLAIN and t.dtype == state.dtype and t.is_contiguous()) for t in tensors)
    if all(in_place):
        batch, *heads, dim, N = state.shape
        if len(KNOWN_CALLS) >= MAX_KNOWN_CALLS:
            KNOWN_CALLS.clear()
        sizes = (batch, *(heads or [1]), dim, groups, N)
        KNOWN_CALLS[layout] = _compiled_function(state.dtype), sizes, state.numel() >= MIN_THREADED


def _call_compiled(
    tensors: tuple[Tensor | None, ...], update: Callable, sizes: tuple[int, ...], threaded: bool, softplus: bool
) -> Tensor | None:
    """Call the compiled step on contiguous tensors of one dtype.

    Return None where a mode makes every new tensor a fake one, or where a tensor has no numbers in memory.
    """
    out = torch.empty_like(tensors[1])
    if type(out) is not Tensor:
        return None
    if any(t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors):
        return None  # check_dense refuses it
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    threads = torch.get_num_threads() if threaded else 1
    if not update(CPP_ARGUMENTS.pack(*sizes, softplus, threads, *pointers, out.data_ptr())):
        odd = int((~torch.isfinite(tensors[3])).sum())
        raise ValueError(f"A must be finite; got {odd} values that are not, and the state has taken them in.")
    return out


def _add_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> list[Tensor | None]:
    """Check the arguments, and return them with a dimension of heads."""
    check_dense(dict(state=state, x=x, dt=dt, A=A, B=B, C=C), dict(D=D, z=z, dt_bias=dt_bias))
    if state.ndim not in (3, 4):
        raise ValueError(f"state must be [batch, D, N] or [batch, heads, P, N]; got {tuple(state.shape)}.")
    heads = state.ndim == 4
    batch, *channels, N = state.shape
    expected = {
        "x": (x, (batch, *channels)),
        "dt": (dt, (batch, *channels)),
        "A": (A, (*channels, N)),
        "D": (D, tuple(channels)),
        "z": (z, (batch, *channels)),
        "dt_bias": (dt_bias, tuple(channels)),
    }
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {shape}; got {tuple(t.shape)}.")
    groups = B.shape[1] if B.ndim == 3 else 1
    rows = (batch, N) if B.ndim == 2 else (batch, groups, N)
    for name, t in (("B", B), ("C", C)):
        if t.shape != rows or not groups or (channels[0] if heads else 1) % groups:
            raise ValueError(
                f"{name} must be {(batch, N)} or [{batch}, G, {N}], as the other, with G dividing the heads; "
                f"got {tuple(t.shape)}."
            )
    check_tensors(dict(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias), N)
    if not state.is_contiguous():
        raise ValueError("state must be contiguous: it is changed in place.")
    B, C = (t if t.ndim == 3 else t[:, None] for t in (B, C))
    if heads:
        return [state, x, dt, A, B, C, D, z, dt_bias]
    D, dt_bias = (t if t is None else t[None] for t in (D, dt_bias))
    return [state[:, None], x[:, None], dt[:, None], A[None], B, C, D, z if z is None else z[:, None], dt_bias]


def update_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Compute the definition with heads, in PyTorch operators in the dtype of `state`, which changes in place."""
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


def update_cpu(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Compute update_reference with the compiled step.

    Outside torch.compile it is a plain call, because a step takes as long as a few dispatches of torch.
    """
    arguments = state, x, dt, A, B, C, D, z, dt_bias, softplus
    without_memory = torch.compiler.is_compiling() or type(state) is not Tensor
    out = None if without_memory else update_compiled(*arguments)
    return torch.ops.workbench.selective_state_update(*arguments) if out is None else out


def update_compiled(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:
    """Copy the arguments to contiguous tensors of the state's dtype where necessary, and call the compiled step."""
    dtype = state.dtype
    tensors = [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous()
        for t in (x, dt, A, B, C, D, z, dt_bias)
    ]
    sizes = (*state.shape[:3], B.shape[1], state.shape[3])
    return _call_compiled((state, *tensors), _compiled_function(dtype), sizes, state.numel() >= MIN_THREADED, softplus)


def _compiled_function(dtype: torch.dtype) -> Callable:
    name = "update_double" if dtype == torch.float64 else "update_float"
    return getattr(require_library(compiled_library()), name)


def _fake_update(state: Tensor, x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x, dtype=state.dtype, memory_format=torch.contiguous_format)


if SOURCE.exists():  # an exported copy has no source, and must not define our operator a second time
    torch.library.custom_op(
        "workbench::selective_state_update", update_compiled, mutates_args=("state",), device_types="cpu"
    ).register_fake(_fake_update)


def _triton(*arguments: Any) -> Tensor:
    from kernels.selective_scan.fused import update_triton  # Triton is optional, and takes a second to import

    return update_triton(*arguments)


IMPLEMENTATIONS: Implementations = {
    "triton": why_no_triton,
    "cpu": why_unavailable,
    "reference": always_available,
    "mamba_ssm": functools.partial(why_no_mamba_ssm, operator="selective_state_update", lacks=None),
}
UPDATES: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    "cpu": update_cpu,
    "reference": update_reference,
    "mamba_ssm": update_mamba_ssm,
}


@torch.compiler.assume_constant_result  # torch.compile does not trace into it
def _choose(impl: str, device: str, dtype: torch.dtype) -> str:
    return choose("selective_state_update", impl, device, dtype, IMPLEMENTATIONS)
