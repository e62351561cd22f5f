"""The compiled delta rule as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.allocator import allocate
from kernels.cpp_build import lanes, load_library, needs_gradients, register_operators, require_library, why_no_library

SOURCE = Path(__file__).with_name("cpu.cpp")
SIZES = (
    "batch",
    "length",
    "heads",
    "heads_q",
    "heads_k",
    "heads_v",
    "keys",
    "values",
    "per_channel",
    "normalize",
    "threads",
)
ARGUMENTS = ("q", "k", "v", "g", "beta")
POINTERS = (*ARGUMENTS, "document_ids", "state", "chunk_states", "o", *(f"d{name}" for name in ARGUMENTS))


class _Rule(ctypes.Structure):
    """`Rule` of head.h: all arguments of a call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none; the first call compiles it."""
    return load_library(SOURCE)


def why_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Return why the compiled rule cannot run on this device in this dtype, or None; the first call compiles it."""
    return why_no_library(device, dtype, compiled_library)


def _call(
    name: str,
    arguments: tuple[Tensor, ...],
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
    **others: Tensor | None,
) -> None:
    q, k, v, g, beta = arguments = tuple(t.contiguous() for t in arguments)
    batch, length, heads = beta.shape
    sizes = batch, length, heads, q.shape[2], k.shape[2], v.shape[2], k.shape[3], v.shape[3]
    ids = None if document_ids is None else document_ids.long().contiguous()
    tensors = dict(zip(ARGUMENTS, arguments, strict=True)) | others | {"document_ids": ids}
    addresses = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    rule = _Rule(*sizes, g.shape[3] > 1 or k.shape[3] == 1, normalize, torch.get_num_threads(), scale, **addresses)
    suffix = "double" if v.dtype == torch.float64 else "float"
    getattr(require_library(compiled_library()), f"{name}_{suffix}")(ctypes.byref(rule))


def _chunk_states_shape(S: Tensor, length: int) -> tuple[int, ...]:
    library = require_library(compiled_library())
    width, steps = lanes(library, S), library.steps_of_chunk(*map(ctypes.c_int64, S.shape[2:]))
    return *S.shape[:2], -(-length // steps), S.shape[2], -(-S.shape[3] // width) * width


def rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    S: Tensor,
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute delta_rule_reference, and with `keep` what its backward pass needs.

    Returns:
        o; the last S; the states before each chunk (empty unless `keep`).
    """
    last = S.clone(memory_format=torch.contiguous_format)
    o = allocate((*beta.shape, v.shape[3]), v)
    chunk_states = allocate(_chunk_states_shape(S, beta.shape[1]) if keep else (0,), v)
    kept = chunk_states if keep else None
    _call("forward", (q, k, v, g, beta), document_ids, scale, normalize, state=last, chunk_states=kept, o=o)
    return o, last, chunk_states


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    S: Tensor,
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        v.new_empty(*beta.shape, v.shape[3]),
        torch.empty_like(S, memory_format=torch.contiguous_format),
        v.new_empty(_chunk_states_shape(S, beta.shape[1]) if keep else 0),
    )


def rule_backward(
    do: Tensor,
    dS: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_states: Tensor,
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, g, beta and S."""
    dS = dS.clone(memory_format=torch.contiguous_format)
    gradients = [allocate((*beta.shape, t.shape[3]), t) for t in (q, k, v, g)] + [allocate(beta.shape, beta)]
    others = dict(state=dS, chunk_states=chunk_states, o=do.contiguous())
    others |= {f"d{name}": t for name, t in zip(ARGUMENTS, gradients, strict=True)}
    _call("backward", (q, k, v, g, beta), document_ids, scale, normalize, **others)
    for i, t in enumerate((q, k, v)):  # heads that shared one add up
        if t.shape[2] != beta.shape[2]:
            gradients[i] = gradients[i].unflatten(2, (t.shape[2], -1)).sum(3)
    return *gradients, dS


def _fake_backward(
    do: Tensor,
    dS: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_states: Tensor,
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, g, beta, dS))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, _, document_ids, ctx.scale, ctx.normalize, ctx.has_chunk_states = inputs
    ctx.save_for_backward(*tensors, output[2], document_ids)
    ctx.set_materialize_grads(False)  # zeros as large as all chunk states would be made, and not used


def _gradients(ctx: FunctionCtx, do: Tensor | None, dS: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_chunk_states:
        raise RuntimeError("This delta rule ran without gradients in mind (keep=False).")
    saved = ctx.saved_tensors  # once: with activation checkpointing a second look is refused
    _, k, v, _, beta, *_ = saved
    batch, _, heads = beta.shape
    do = v.new_zeros(*beta.shape, v.shape[3]) if do is None else do
    dS = v.new_zeros(batch, heads, k.shape[3], v.shape[3]) if dS is None else dS
    gradients = torch.ops.workbench.delta_rule_backward(do, dS, *saved, ctx.scale, ctx.normalize)
    return *gradients, None, None, None, None


def delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    S: Tensor,
    document_ids: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Compute delta_rule_reference of q and k, normalized if asked, and q scaled, with the compiled operators."""
    keep = needs_gradients("delta_rule", q, k, v, g, beta, S)
    o, last, _ = torch.ops.workbench.delta_rule(q, k, v, g, beta, S, document_ids, scale, normalize, keep)
    return o, last


if SOURCE.exists():  # an exported copy has no source, and must not define our operators a second time
    register_operators(
        "delta_rule",
        rule_forward,
        rule_backward,
        fakes=(_fake_forward, _fake_backward),
        gradients=_gradients,
        setup_context=_setup_context,
    )
