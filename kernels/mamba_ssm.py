"""The scans and the decoding step by mamba-ssm's kernels, where that is installed: what theirs take of what ours take.

batch · D channels · L time · H heads · P channels of a head · N state · G groups
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FUNCTIONS = {
    "selective_scan": ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
    "chunk_scan": ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"),
    "selective_state_update": ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
}
MAX_STATES = 256  # of their selective scan
CHUNK = 256  # steps of a chunk, as in their layer (modules/mamba2.py)


def why_no_mamba_ssm(device: str, dtype: torch.dtype, *, operator: str, lacks: str | None) -> str | None:
    """Return why mamba-ssm cannot run a call of this operator, or None if it can; `lacks` is what theirs has not."""
    if device != "cuda":
        return f"the tensors are on {device}, and mamba-ssm's kernels need a GPU"
    if dtype == torch.float64:
        return "it computes in float32; for float64 there are 'chunked' and 'reference'"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    return lacks or _why_not_imported(operator)


@functools.cache
def _why_not_imported(operator: str) -> str | None:
    try:
        module = importlib.import_module(FUNCTIONS[operator][0])  # an import statement would make every export need it
        _function(operator)
    except Exception as error:  # whatever its import raises on this machine, the other implementations run
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            return "mamba-ssm is not installed"
        return f"mamba-ssm does not import ({type(error).__name__}: {error})".splitlines()[0]
    if operator == "selective_scan" and getattr(module, "selective_scan_cuda", None) is None:
        return "mamba-ssm was installed without its CUDA code (selective_scan_cuda)"
    return None


@functools.cache
def _function(operator: str) -> Callable[..., Any]:
    module, name = FUNCTIONS[operator]
    return getattr(importlib.import_module(module), name)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Return whether a call of these tensors is differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def selective_scan_lacks(
    states: int, queries: int, has_state: bool, has_documents: bool, normalize: bool, differentiates_state: bool
) -> str | None:
    """Return what `selective_scan_fn` has not of a call, as why it cannot run; None if it has all."""
    lacking = {
        "it has no denominator (normalize=True)": normalize,
        "it has no initial_state": has_state,
        "it has no document_ids": has_documents,
        f"it has one query per state; this call has {queries}": queries != 1,
        f"it takes at most {MAX_STATES} states; A has {states}": states > MAX_STATES,
        "it gives the last state no gradient; call it under torch.no_grad() or without return_last_state": (
            differentiates_state
        ),
    }
    return next((reason for reason, lacks in lacking.items() if lacks), None)


def selective_scan_mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute selective_scan_reference of what `selective_scan_fn` has, from a state of zeros."""
    y, last = _function("selective_scan")(u, delta, A, B, C, return_last_state=True)
    return (y,), last[None]


def chunk_scan_lacks(groups_of_B: int, groups_of_C: int, normalize: bool) -> str | None:
    """Return what `mamba_chunk_scan_combined` has not of a call, as why it cannot run; None if it has all."""
    if normalize:
        return "it has no denominator (normalize=True)"
    if groups_of_B != groups_of_C:
        return f"it takes as many groups of C as of B; there are {groups_of_C} and {groups_of_B}"
    return None


def chunk_scan_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute y of `chunk_scan` [batch, L, H, P] and its final states [batch, H, N, P], in float32.

    x, B and C keep their dtype, which is x's; products of float32 are in TF32. `document_ids` are numbered from 0."""
    B, C = (t.to(x.dtype) for t in (B, C))
    dt, A, D = (t if t is None else t.float() for t in (dt, A, D))
    y, S = _function("chunk_scan")(
        x, dt, A, B, C, CHUNK, D=D,
        initial_states=None if initial_states is None else initial_states.float().mT.contiguous(),
        seq_idx=None if document_ids is None else document_ids.int(),
        return_final_states=True,
    )  # fmt: skip
    return y, S.float().mT


def update_mamba_ssm(
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
    """Compute update_reference, but in float32 whatever the dtype of `state` is, which changes in place."""
    if dt_bias is None:  # theirs fails without one
        dt_bias = torch.zeros(state.shape[1:3], device=state.device)
    run = _function("selective_state_update")
    return run(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=softplus)
