"""The gated delta rule: a linear recurrence whose state is corrected, step by step, towards the values of its keys.

`kda` has one decay per key channel (Kimi Delta Attention, arXiv 2510.26692), `gated_delta_rule` one per head (Gated
DeltaNet, arXiv 2412.06464). Arguments and results are those of flash-linear-attention's `chunk_kda` and
`chunk_gated_delta_rule`.

batch · T time · H heads, those of beta · K keys and V values of a head
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import check_dense, check_documents, check_flags, check_tensors
from kernels.delta_rule.chunked import delta_rule_chunked
from kernels.delta_rule.cpu import delta_rule_cpu, why_unavailable
from kernels.delta_rule.fla import delta_rule_fla, why_no_fla
from kernels.delta_rule.reference import delta_rule_reference
from kernels.dispatch import Implementations, always_available, choose, without_autocast

EPSILON = 1e-6  # under the root of an L2 norm, as in flash-linear-attention and transformers


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    document_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return o [batch, T, H, V] in the dtype of v, and the final state [batch, H, K, V] if asked, else None.

    S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t; in float32, or in
    float64 if v is, the state too. flash-linear-attention's kernels multiply float32 in TF32 and 16 bits as they are.

    Args:
        q: [batch, T, heads, K]. The heads of q, k and v divide H each, and H / heads consecutive ones share one: this
            takes grouped values (as flash-linear-attention's) and grouped queries (fewer heads of k and v) alike.
        k: [batch, T, heads, K], of length 1 or so: with beta |k|^2 above 2 the state grows without bound.
        v: [batch, T, heads, V].
        g: [batch, T, H, K], logarithms of the decays, not positive.
        beta: [batch, T, H], how much of a value is written.
        scale: of q; None: 1 / sqrt(K).
        initial_state: [batch, H, K, V].
        output_final_state: whether the state after the last step is returned too.
        use_qk_l2norm_in_kernel: whether q and k are divided by their length first.
        document_ids: integers [batch, T]; the state starts anew where the id changes.
        impl: "fla" (flash-linear-attention's kernels), "cpu" (compiled), "chunked" (PyTorch operators), "reference", or
            "auto": the first that runs.

    Raises:
        ValueError: for a wrong type, shape, dtype or device, or an `impl` that cannot run.
    """
    _check(q, k, v, g, beta, initial_state, document_ids, (k.shape[-1],) if isinstance(k, Tensor) and k.ndim else ())
    options = initial_state, output_final_state, use_qk_l2norm_in_kernel, document_ids, impl
    return _run("kda", q, k, v, g, beta, scale, *options)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    document_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return what `kda` does, of the same arguments, with one decay per head: g is [batch, T, H]."""
    _check(q, k, v, g, beta, initial_state, document_ids, ())
    options = initial_state, output_final_state, use_qk_l2norm_in_kernel, document_ids, impl
    return _run("gated_delta_rule", q, k, v, g[..., None], beta, scale, *options)


def operations(keys: int, values: int) -> int:
    """Return the multiplications and additions per step of a head, forward, in the chunks of the compiled rule
    (README.md); backward needs twice as many."""
    chunk = 32 if keys <= 64 and values <= 64 else 64
    return 2 * chunk * (keys + values) + 6 * keys * values


def _run(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    document_ids: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    check_flags(output_final_state=output_final_state, use_qk_l2norm_in_kernel=normalize)
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale must be a number or None; got {type(scale).__name__}.")
    dtype, out_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32, v.dtype
    implementation = _choose(operator, impl, v.device.type, dtype, k.shape[-1])
    factor_dtype = out_dtype if implementation == "fla" else dtype  # of q, k and v
    q, k, v = (t.to(factor_dtype) for t in (q, k, v))
    g, beta = g.to(dtype), beta.to(dtype)
    if initial_state is None:
        S = beta.new_zeros(v.shape[0], beta.shape[2], k.shape[-1], v.shape[-1])
    else:
        S = initial_state.to(dtype)
    if document_ids is not None:  # numbered by change, because an id that comes back is another document
        document_ids = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)).cumsum(1)
    with without_autocast(v.device.type):  # products of states stay in this dtype
        scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
        o, S = RULES[implementation](q, k, v, g, beta, S, document_ids, scale, normalize)
    return o.to(out_dtype), S if output_final_state else None


def _of_normalized(rule: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a rule that normalizes q and k, if asked, and scales q, before it calls this one, which does not."""

    def run(
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
        if normalize:
            q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + EPSILON) for t in (q, k))
        return rule(q * scale, k, v, g, beta, S, document_ids)

    return run


RULES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fla": delta_rule_fla,
    "cpu": delta_rule_cpu,
    "chunked": _of_normalized(delta_rule_chunked),
    "reference": _of_normalized(delta_rule_reference),
}


@torch.compiler.assume_constant_result  # torch.compile does not trace into it
def _choose(operator: str, impl: str, device: str, dtype: torch.dtype, keys: int) -> str:
    implementations: Implementations = {
        "fla": functools.partial(why_no_fla, operator=operator, keys=keys),
        "cpu": why_unavailable,
        "chunked": always_available,
        "reference": always_available,
    }
    return choose(operator, impl, device, dtype, implementations)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
    per_head: tuple[int, ...],
) -> None:
    """Check all tensors; `per_head`: the decays of a head."""
    optional = dict(initial_state=initial_state, document_ids=document_ids)
    check_dense(dict(q=q, k=k, v=v, g=g, beta=beta), optional)
    if beta.ndim != 3 or 0 in beta.shape:
        raise ValueError(f"beta must be [batch, T, H], not empty; got {tuple(beta.shape)}.")
    batch, T, H = beta.shape
    for name, t in dict(q=q, k=k, v=v).items():
        if t.ndim != 4 or t.shape[:2] != (batch, T) or not t.shape[2] or H % t.shape[2]:
            raise ValueError(
                f"{name} must be [batch, T, heads, size] with batch {batch}, T {T} and heads that divide the {H} of"
                f" beta; got {tuple(t.shape)}."
            )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same size of a head; got {q.shape[-1]} and {k.shape[-1]}.")
    if g.shape != (batch, T, H, *per_head):
        raise ValueError(f"g must be {(batch, T, H, *per_head)}; got {tuple(g.shape)}.")
    state = (batch, H, k.shape[-1], v.shape[-1])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state must be {state}; got {tuple(initial_state.shape)}.")
    check_tensors(dict(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state), k.shape[-1])
    check_documents(document_ids, (batch, T), v.device)
