"""One step of the selective scan, for decoding: the state is changed in place."""

import struct
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_decay, check_flags, check_plain, check_tensors
from kernels.cpp_build import loaded
from kernels.dispatch import anywhere, pick, why_not_triton
from kernels.selective_scan.cpu import SOURCE, native, why_not

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
    tensors = state, x, dt, A, B, C, D, z, dt_bias
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise ValueError("selective_state_update has no gradients; call it under torch.no_grad(), or selective_scan to train.")
    check_flags(dt_softplus=dt_softplus)
    plain = type(state) is Tensor and not torch.compiler.is_compiling()  # not a fake tensor, which has no memory
    layout = _layout(impl, tensors) if plain else None
    known = DIRECT.get(layout) if plain else None
    out = _direct(tensors, *known, dt_softplus) if known else None
    if out is None:
        arguments = _per_head(*tensors)
        way = _pick(impl, state.device.type, state.dtype)
        if way != "cpu":  # which looks at A as it goes
            check_decay(A)
        out = STEPS[way](*arguments, dt_softplus).view(x.shape).to(x.dtype)
        if plain and way == "cpu":
            _remember(layout, tensors, groups=arguments[4].shape[1])
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(state)  # a backward pass that saved it must not use what it became
    return out


# A step lasts as long as some thirty attributes of a tensor, so what was checked of one is remembered: the layout of all arguments
# -> function, sizes and whether more than one thread pays, of those that the compiled step reads where they are.
DIRECT: dict[tuple, tuple[Callable, tuple[int, ...], bool]] = {}
KNOWN = 256  # layouts at most
PLAIN = (Tensor, torch.nn.Parameter)


def _layout(impl: str, tensors: tuple[Tensor | None, ...]) -> tuple:
    """What decides how the arguments are read. Anything but a plain tensor is its type."""
    return impl if isinstance(impl, str) else type(impl), *[_layout_of(t) if type(t) in PLAIN else type(t) for t in tensors]


def _layout_of(t: Tensor) -> tuple:
    strided = t.layout is torch.strided and not t.is_nested
    return (t.shape, t.dtype, t.is_cpu, t.is_contiguous()) if strided else (t.layout,)


def _remember(layout: tuple, tensors: tuple[Tensor | None, ...], groups: int) -> None:
    state = tensors[0]
    if all(t is None or (type(t) in PLAIN and t.dtype == state.dtype and t.is_contiguous()) for t in tensors):
        batch, *heads, dim, N = state.shape
        if len(DIRECT) >= KNOWN:
            DIRECT.clear()
        DIRECT[layout] = _function(state.dtype), (batch, *(heads or [1]), dim, groups, N), state.numel() >= THREADED


def _direct(tensors: tuple[Tensor | None, ...], update: Callable, sizes: tuple[int, ...], threaded: bool, softplus: bool) -> Tensor | None:
    """The compiled step of contiguous tensors of one dtype; None where a mode makes every new tensor a fake one, or one has no numbers."""
    out = torch.empty_like(tensors[1])
    if type(out) is not Tensor:
        return None
    if any(t is not None and (t.is_neg() or t._is_zerotensor()) for t in tensors):
        return None  # its numbers are not in memory; refused elsewhere
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    if not update(ARGUMENTS.pack(*sizes, softplus, torch.get_num_threads() if threaded else 1, *pointers, out.data_ptr())):
        raise ValueError(
            f"A must be finite; got {int((~tensors[3].isfinite()).sum())} values that are not, and the state has taken them in."
        )
    return out


def _per_head(state, x, dt, A, B, C, D, z, dt_bias) -> list[Tensor | None]:
    """The same with heads, checked."""
    check_plain(dict(state=state, x=x, dt=dt, A=A, B=B, C=C), dict(D=D, z=z, dt_bias=dt_bias))
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


ARGUMENTS = struct.Struct("=17q")  # cpu.cpp's Update: sizes, then addresses


def update_cpu(state, x, dt, A, B, C, D, z, dt_bias, softplus: bool) -> Tensor:
    """As update_reference. A plain call outside torch.compile: a step lasts as long as a few dispatches."""
    arguments = state, x, dt, A, B, C, D, z, dt_bias, softplus
    fake = torch.compiler.is_compiling() or type(state) is not Tensor  # without memory
    out = None if fake else update_once(*arguments)
    return torch.ops.workbench.selective_state_update(*arguments) if out is None else out


def update_once(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool,
) -> Tensor:  # fmt: skip
    dtype = state.dtype
    tensors = [
        t if t is None or (t.dtype == dtype and t.is_contiguous()) else t.to(dtype).contiguous() for t in (x, dt, A, B, C, D, z, dt_bias)
    ]
    return _direct((state, *tensors), _function(dtype), (*state.shape[:3], B.shape[1], state.shape[3]), state.numel() >= THREADED, softplus)


def _function(dtype: torch.dtype) -> Callable:
    return getattr(loaded(native()), "update_double" if dtype == torch.float64 else "update_float")


if SOURCE.exists():  # as the scan
    update = torch.library.custom_op("workbench::selective_state_update", update_once, mutates_args=("state",), device_types="cpu")
    update.register_fake(lambda state, x, *rest: torch.empty_like(x, dtype=state.dtype, memory_format=torch.contiguous_format))


def _triton(*arguments):
    from kernels.selective_scan.fused_update import update_triton  # Triton is optional, and takes a second to import

    return update_triton(*arguments)


WAYS = {"triton": why_not_triton, "cpu": why_not, "reference": anywhere}
STEPS = {"triton": _triton, "cpu": update_cpu, "reference": update_reference}


@torch.compiler.assume_constant_result  # torch.compile does not look inside
def _pick(impl: str, device: str, dtype: torch.dtype) -> str:
    return pick("selective_state_update", impl, device, dtype, WAYS)
