"""The delta rules by flash-linear-attention's kernels, where that is installed: what theirs take of what ours take.

batch · T time · H heads · K keys · V values
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 64  # steps up to which a call without gradients runs step by step (ours)
MAX_KEYS = 256  # of theirs
# A decay below exp(-100) is 0 in float32. Theirs take differences of sums of logarithms, of which fewer digits are
# left the larger they are, and none where one is infinite.
MIN_LOG = -100.0


def why_no_fla(device: str, dtype: torch.dtype, *, operator: str, keys: int) -> str | None:
    """Return why flash-linear-attention cannot run `kda` or `gated_delta_rule` with so many keys, or None if it can."""
    if device != "cuda":
        return f"the tensors are on {device}, and flash-linear-attention's kernels need a GPU"
    if dtype == torch.float64:
        return "it computes in float32; for float64 there are 'chunked' and 'reference'"
    if keys > MAX_KEYS:
        return f"it takes heads of at most {MAX_KEYS} keys; these have {keys}"
    return _why_not_imported(operator)


@functools.cache
def _why_not_imported(operator: str) -> str | None:
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    try:
        _function(operator, "chunk"), _function(operator, "fused_recurrent")
    except Exception as error:  # whatever its import raises on this machine, the other implementations run
        return f"flash-linear-attention does not import ({type(error).__name__}: {error})".splitlines()[0]
    if operator == "gated_delta_rule" and _is_refused():
        return "flash-linear-attention refuses its gradients on this GPU with Triton 3.4 to 3.7.0 (its issue 640)"
    return None


def _is_refused() -> bool:
    """Return whether their backward pass of `gated_delta_rule` raises (fla/ops/common/chunk_o.py, 0.6.0)."""
    triton = importlib.import_module("triton")  # an import statement would make every export need it
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    hopper = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    return hopper and (3, 4, 0) <= version < (3, 7, 1) and importlib.util.find_spec("tilelang") is None


def _function(operator: str, form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(importlib.import_module(f"fla.ops.{operator}"), f"{form}_{operator}")


def delta_rule_fla(
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
    """Compute delta_rule_reference of q and k, normalized if asked, and q scaled, with their kernels.

    q, k and v keep their dtype; products of float32 are in TF32."""
    batch, T, H = beta.shape
    per_channel = g.shape[-1] == k.shape[-1]
    operator = "kda" if per_channel else "gated_delta_rule"
    tensors = q, k, v, g, beta, S
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    run = _function(operator, "chunk" if needs_gradients or T > SHORT else "fused_recurrent")
    # theirs have as many heads of k as of q, and as many of v as of beta
    shared = math.lcm(q.shape[2], k.shape[2])
    q, k, v = (
        t if t.shape[2] == n else t.repeat_interleave(n // t.shape[2], 2)
        for t, n in zip((q, k, v), (shared, shared, H), strict=True)
    )
    g = (g if per_channel else g[..., 0]).clamp(min=MIN_LOG)
    options = dict(scale=scale, output_final_state=True, use_qk_l2norm_in_kernel=normalize)
    if document_ids is None or T == 1:
        o, last = run(q=q, k=k, v=v, g=g, beta=beta, initial_state=S, **options)
        return o, last
    # one row of all documents; the first of each row goes on from the row's state
    starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    ends = starts.sum(1).cumsum(0)
    firsts = F.pad(ends[:-1], (1, 0))
    borders = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=batch * T)
    states = S.new_zeros(len(borders) - 1, *S.shape[1:]).index_copy(0, firsts, S)
    q, k, v, g, beta = (t.flatten(0, 1)[None] for t in (q, k, v, g, beta))
    o, last = run(q=q, k=k, v=v, g=g, beta=beta, initial_state=states, cu_seqlens=borders, **options)
    return o[0].unflatten(0, (batch, T)), last[ends - 1]
