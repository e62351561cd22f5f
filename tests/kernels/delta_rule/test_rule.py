"""Both delta rules: every implementation equals the reference, the reference the formula, and both others' code."""

import ctypes
import functools
import importlib
import inspect
import platform
import random

import pytest
import torch

import kernels.delta_rule.chunked as chunked
from kernels.delta_rule import gated_delta_rule, kda, operations
from kernels.delta_rule.cases import CASES, HEADS, make
from kernels.delta_rule.cpu import compiled_library
from kernels.products import solve_unit_lower
from tests.conftest import assert_close
from tests.kernels.conftest import (
    BFLOAT16,
    CPU,
    FLOAT32,
    FLOAT64,
    assert_compiles,
    assert_threads_change_nothing,
    needs_compiler,
    run,
)

RULES = {"kda": (kda, True), "gated_delta_rule": (gated_delta_rule, False)}
every_rule = pytest.mark.parametrize("rule, per_channel", RULES.values(), ids=RULES)
every_impl = pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
every_fast = pytest.mark.parametrize("impl", [CPU, "chunked"])


@functools.cache
def by_reference(rule, length, case, per_channel):
    """Outputs and gradients of a case in float64."""
    return run(rule, make(length, **CASES[case], per_channel=per_channel), "reference")


@every_fast
@every_rule
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 3, 7, 63, 64, 65, 150])
def test_each_is_the_reference(impl, rule, per_channel, case, length):
    outputs, gradients = run(rule, make(length, **CASES[case], per_channel=per_channel), impl)
    expected, expected_gradients = by_reference(rule, length, case, per_channel)
    assert_close(outputs, expected, FLOAT64)
    assert_close(gradients, expected_gradients, FLOAT64, floor=0.01)


@every_impl
def test_formula(impl):
    """S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T (arXiv 2510.26692, equation 1)."""
    a = make(9, state=True)
    o, last = kda(**a, scale=0.5, output_final_state=True, impl=impl)
    S, identity = a["initial_state"], torch.eye(5, dtype=torch.float64)
    for t in range(9):
        k, v, beta = a["k"][:, t], a["v"][:, t], a["beta"][:, t, :, None, None]
        S = (identity - beta * k[..., :, None] * k[..., None, :]) @ (a["g"][:, t].exp()[..., None] * S)
        S = S + beta * k[..., :, None] * v[..., None, :]
        assert_close(o[:, t], 0.5 * (S.mT @ a["q"][:, t, :, :, None])[..., 0], FLOAT64)
    assert_close(last, S, FLOAT64)


@every_impl
def test_one_decay_per_head_is_the_same_for_all_channels(impl):
    a = make(70, per_channel=False, state=True)
    many = a | dict(g=a["g"][..., None].expand(-1, -1, -1, 5))
    assert_close(gated_delta_rule(**a, impl=impl)[0], kda(**many, impl=impl)[0], FLOAT64)


@every_rule
@every_impl
def test_grouped_heads_are_repeated_ones(rule, per_channel, impl):
    a = make(70, q=2, k=1, v=4, per_channel=per_channel)
    repeated = a | {name: a[name].repeat_interleave(HEADS // a[name].shape[2], 2) for name in "qkv"}
    assert_close(rule(**a, impl=impl)[0], rule(**repeated, impl=impl)[0], FLOAT64)


@every_impl
@pytest.mark.parametrize("border", [20, 64, 70])
def test_documents_are_separate_runs(impl, border):
    """The first continues the given state, and the last state is the last document's; borders in and between chunks."""
    a = make(130, state=True)
    state = a.pop("initial_state")
    ids = torch.tensor([4] * border + [9] * (130 - border)).expand(2, -1)
    options = dict(output_final_state=True, impl=impl)
    o, last = kda(**a, initial_state=state, document_ids=ids, **options)
    first, _ = kda(**{k: t[:, :border] for k, t in a.items()}, initial_state=state, **options)
    second, expected = kda(**{k: t[:, border:] for k, t in a.items()}, **options)
    assert_close(o, torch.cat([first, second], 1), FLOAT64)
    assert_close(last, expected, FLOAT64)


@every_rule
@every_impl
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_goes_on_from_a_state(rule, per_channel, impl, cut):
    a, options = make(100, per_channel=per_channel), dict(output_final_state=True, impl=impl)
    whole, last = rule(**a, **options)
    first, state = rule(**{k: t[:, :cut] for k, t in a.items()}, **options)
    second, end = rule(**{k: t[:, cut:] for k, t in a.items()}, initial_state=state, **options)
    assert_close(torch.cat([first, second], 1), whole, FLOAT64)
    assert_close(end, last, FLOAT64)


@every_impl
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_normalizes_and_scales(impl, scale):
    """It changes what follows from q and k, and their gradients, as the same operations outside would."""
    a = make(70, K=4, q=2, k=1, state=True)

    def outside(q, k, impl, **others):
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        return kda(q * (0.5 if scale is None else scale), k, scale=1.0, impl=impl, **others)

    inside = functools.partial(kda, use_qk_l2norm_in_kernel=True, scale=scale)
    for found, wanted in zip(run(inside, a, impl), run(outside, a, "chunked"), strict=True):
        assert_close(found, wanted, FLOAT64, floor=0.01)


@every_fast
@every_rule
@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_float64(impl, rule, per_channel, case):
    outputs, gradients = run(rule, make(150, **CASES[case], per_channel=per_channel, dtype=torch.float32), impl)
    expected, expected_gradients = by_reference(rule, 150, case, per_channel)
    assert all(o.dtype == torch.float32 for o in outputs)
    assert_close(outputs, expected, FLOAT32)
    assert_close(gradients, expected_gradients, FLOAT32, floor=0.01)


@every_fast
@every_rule
def test_the_error_does_not_grow_with_the_length(impl, rule, per_channel):
    """Weak decays: the state remembers thousands of steps."""
    single = make(32768, K=16, q=2, k=1, v=2, decay=0.0, per_channel=per_channel, dtype=torch.float32)
    single = {k: t[:1] for k, t in single.items()}
    found = rule(**single, impl=impl)[0]
    expected = rule(**{k: t.double() for k, t in single.items()}, impl="chunked")[0]
    parts = zip(found.split(2048, 1), expected.split(2048, 1), strict=True)
    errors = [(f.double() - e).norm() / e.norm() for f, e in parts]
    assert max(errors) < 1e-6 and errors[-1] < 2 * errors[1]


@every_fast
@every_rule
def test_very_strong_decays_forget_and_stay_finite(impl, rule, per_channel):
    """A product of exp(-sum) and exp(sum), as flash-linear-attention's naive chunks have it, is infinity times zero."""
    a = make(130, per_channel=per_channel, dtype=torch.float32)
    a["g"] -= 1e4
    outputs, gradients = run(rule, a, impl)
    assert all(t.isfinite().all() for t in (*outputs, *gradients))
    kept = a["beta"][..., None] * (a["q"] * a["k"]).sum(-1, keepdim=True) * a["v"] / 5**0.5
    assert_close(outputs[0], kept, FLOAT32)


@every_fast
def test_an_infinite_decay_is_a_new_document(impl):
    a = make(100)
    a["g"][:, 30] = -torch.inf
    ids = (torch.arange(100) >= 30).long().expand(2, -1)
    assert_close(kda(**a, impl=impl)[0], kda(**make(100), document_ids=ids, impl=impl)[0], FLOAT64)


@every_fast
@every_rule
@pytest.mark.parametrize("seed", range(6))
def test_a_value_that_is_not_finite_reaches_what_it_reaches_in_the_reference(impl, rule, per_channel, seed):
    rng = random.Random(seed)
    a = make(130, documents=True, state=True, per_channel=per_channel)
    name = rng.choice([k for k, t in a.items() if t.is_floating_point()])
    a[name].view(-1)[rng.randrange(a[name].numel())] = rng.choice([float("nan"), float("inf")])
    a["use_qk_l2norm_in_kernel"] = rng.random() < 0.5
    for found, wanted in zip(run(rule, a, impl), run(rule, a, "reference"), strict=True):
        for f, w in zip(found, wanted, strict=True):
            assert torch.equal(f.isfinite(), w.isfinite()), name
            assert_close(f.nan_to_num(0, 0, 0), w.nan_to_num(0, 0, 0), FLOAT64)


@every_rule
def test_gradients_by_finite_differences_twice(monkeypatch, rule, per_channel):
    monkeypatch.setattr(chunked, "CHUNK", 4)
    monkeypatch.setattr(chunked, "SMALL", 1)
    a = {k: t[:1] for k, t in make(5, K=2, V=2, q=1, k=2, v=1, state=True, per_channel=per_channel).items()}
    names = [k for k, t in a.items() if t.is_floating_point()]

    def all_of(*tensors):
        return rule(**(a | dict(zip(names, tensors, strict=True))), output_final_state=True, impl="chunked")

    leaves = [a[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(all_of, leaves)
    assert torch.autograd.gradgradcheck(all_of, leaves)


def test_solve_unit_lower_reads_only_below_the_diagonal():
    a, b = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    lower = torch.eye(5, dtype=torch.float64) + a.tril(-1)
    assert_close(lower @ solve_unit_lower(a, b), b, FLOAT64)
    assert torch.autograd.gradgradcheck(solve_unit_lower, (a.requires_grad_(), b.requires_grad_()))


@every_fast
@every_rule
def test_autocast_changes_nothing(impl, rule, per_channel):
    """Neither a forward pass inside, nor a backward pass inside, whose products torch would make bfloat16."""
    a = make(70, K=8, per_channel=per_channel, state=True, dtype=torch.float32)
    plain = run(rule, a, impl)
    inside = run(rule, a, impl, lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        throughout = run(rule, a, impl)
    for found in (inside, throughout):
        assert all(torch.equal(x, y) for f, p in zip(found, plain, strict=True) for x, y in zip(f, p, strict=True))


@every_fast
@every_rule
def test_bfloat16_in_and_out_and_float32_between(impl, rule, per_channel):
    a = make(100, per_channel=per_channel)
    half = {k: t.bfloat16() for k, t in a.items()}
    o, last = rule(**half, output_final_state=True, impl=impl)
    assert o.dtype == torch.bfloat16 and last.dtype == torch.float32
    expected, state = rule(**{k: t.double() for k, t in half.items()}, output_final_state=True)
    assert_close(last, state, FLOAT32)
    assert_close(o, expected, BFLOAT16)


@every_fast
@every_rule
def test_torch_compile_takes_it(impl, rule, per_channel):
    assert_compiles(rule, make(70, documents=True, state=True, per_channel=per_channel, dtype=torch.float32), impl)


@needs_compiler
@pytest.mark.parametrize("keys, values", [(64, 64), (65, 64), (64, 65), (128, 128)])
def test_operations_are_those_of_the_compiled_chunks(keys, values):
    steps = compiled_library().steps_of_chunk(ctypes.c_int64(keys), ctypes.c_int64(values))
    assert operations(keys, values) == 2 * steps * (keys + values) + 6 * keys * values


@needs_compiler
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_its_gradients(output):
    found = []
    for impl in ("cpu", "reference"):
        leaves = {name: t.requires_grad_() for name, t in make(70, state=True).items()}
        result = kda(**leaves, output_final_state=True, impl=impl)[output]
        found.append(torch.autograd.grad(result.square().sum(), [*leaves.values()], materialize_grads=True))
    assert_close(*found, FLOAT64, floor=0.01)


@needs_compiler
@pytest.mark.parametrize("length", [5, 70])
def test_subnormal_numbers_are_zero_in_the_compiled_rule_only(length):
    if platform.machine() != "x86_64":
        pytest.skip("other processors take no longer for them")
    a = make(length, dtype=torch.float32)
    o, _ = kda(**a | dict(v=torch.full_like(a["v"], 1e-39)), impl="cpu")
    assert o.abs().max() == 0
    assert (torch.full((4,), 1e-39) * 0.5).min() > 0


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    a = make(200, q=2, documents=True, dtype=torch.float32)
    assert_threads_change_nothing(lambda: [t for results in run(kda, a, "cpu") for t in results])


# --- other people's code


PATHS = {
    "chunk_kimi_delta_attention": ("kimi_linear", kda, True),
    "recurrent_kimi_delta_attention": ("kimi_linear", kda, True),
    "torch_chunk_gated_delta_rule": ("qwen3_5", gated_delta_rule, False),
    "torch_recurrent_gated_delta_rule": ("qwen3_5", gated_delta_rule, False),
}


@pytest.mark.parametrize("name, family, rule, per_channel", [(k, *v) for k, v in PATHS.items()], ids=PATHS)
@pytest.mark.parametrize("decay", [0.01, 1.0, 100.0])
@every_impl
def test_is_the_torch_path_of_transformers(name, family, rule, per_channel, decay, impl):
    if "chunk" in name and decay > 1:
        pytest.skip("its differences of float32 sums have no digits left there")
    theirs = inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name))
    a = make(130, K=8, decay=decay, state=True, per_channel=per_channel, dtype=torch.float32)

    def as_theirs(impl, q, k, v, **options):
        return theirs(q, k, v, use_qk_l2norm_in_kernel=True, **options)

    options = dict(a, use_qk_l2norm_in_kernel=True)
    (outputs, gradients), (expected, expected_gradients) = run(rule, options, impl), run(as_theirs, a, "auto")
    assert_close(outputs, expected, FLOAT32)
    assert_close(gradients, expected_gradients, 3 * FLOAT32, floor=0.01)


NAIVE = {  # rule of flash-linear-attention -> ours, heads of q and k, whether it has a decay per channel
    "kda": (kda, 2, True),
    "gated_delta_rule": (gated_delta_rule, HEADS, False),
}


@pytest.mark.parametrize("name, rule, heads, per_channel", [(k, *v) for k, v in NAIVE.items()], ids=NAIVE)
@pytest.mark.parametrize("decay", [1.0, 100.0])
@every_impl
def test_is_the_naive_recurrence_of_flash_linear_attention(name, rule, heads, per_channel, decay, impl):
    naive = pytest.importorskip(f"fla.ops.{name}.naive", reason="flash-linear-attention is not installed")
    a = make(70, q=heads, k=heads, decay=decay, state=True, per_channel=per_channel, dtype=torch.float32)

    def as_theirs(impl, **options):
        return getattr(naive, f"naive_recurrent_{name}")(**options)

    (outputs, gradients), (expected, expected_gradients) = run(rule, a, impl), run(as_theirs, a, "auto")
    assert_close(outputs, expected, FLOAT32)
    assert_close(gradients, expected_gradients, 3 * FLOAT32, floor=0.01)


# --- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(beta=torch.ones(2, 9)), r"beta must be \[batch, T, H\], not empty; got \(2, 9\)"),
        (dict(v=torch.ones(2, 8, HEADS, 3)), r"v must be \[batch, T, heads, size\] with batch 2, T 9"),
        (dict(k=torch.ones(2, 9, 3, 5)), "heads that divide the 4 of beta"),
        (dict(q=torch.ones(2, 9, HEADS, 6)), "q and k must have the same size of a head; got 6 and 5"),
        (dict(g=torch.ones(2, 9, HEADS)), r"g must be \(2, 9, 4, 5\); got \(2, 9, 4\)"),
        (dict(initial_state=torch.ones(2, HEADS, 3, 5)), r"initial_state must be \(2, 4, 5, 3\)"),
        (dict(document_ids=torch.ones(2, 9)), "document_ids must be whole numbers"),
        (dict(q="q"), "q must be a tensor; got str"),
        (dict(scale="large"), "scale must be a number or None; got str"),
        (dict(output_final_state=1), "output_final_state must be True or False; got int"),
        (dict(impl="fast"), "impl is 'auto' or one of 'fla', 'cpu', 'chunked', 'reference'; got 'fast'"),
        (dict(v=torch.ones(2, 9, HEADS, 3, dtype=torch.int64)), "v must be floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        kda(**(make(9, dtype=torch.float32) | changes))
