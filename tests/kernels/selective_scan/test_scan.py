"""Every implementation equals the reference, and the reference equals the published formula."""

from collections.abc import Callable

import pytest
import torch

import kernels.selective_scan.chunked as chunked
from kernels.selective_scan import selective_scan
from kernels.selective_scan.cases import CASES, make
from tests.conftest import assert_close
from tests.kernels.conftest import (
    CPU,
    FLOAT32,
    FLOAT64,
    assert_compiles,
    assert_threads_change_nothing,
    needs_compiler,
    run,
)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_each_is_the_reference(options, length, impl):
    (outputs, gradients), (expected, expected_gradients) = (
        run(selective_scan, make(length, **options), i) for i in (impl, "reference")
    )
    assert_close(outputs, expected, FLOAT64)
    assert_close(gradients, expected_gradients, FLOAT64, floor=0.01)


@needs_compiler
@pytest.mark.parametrize("layout", ["time last", "channels last", "neither"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["float64", "float32"]
)
def test_compiled_scan_of_many_blocks(layout, dtype, tolerance):
    """More channels than lanes, a prime number of states, groups, and any memory layout."""
    options = dict(N=29, G=2, R=2, channels=70, normalize=True, documents=True, state=True)
    expected = run(selective_scan, make(150, **options), "reference")
    a = make(150, **options, dtype=dtype)
    for name in ("u", "delta"):
        if layout == "channels last":
            a[name] = a[name].mT.contiguous().mT
        if layout == "neither":
            a[name] = a[name].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2]
    for actual, wanted in zip(run(selective_scan, a, "cpu"), expected, strict=True):
        assert_close(actual, wanted, tolerance)


@needs_compiler
def test_threads_change_nothing():
    """Sums over channels have one order, else a resumed run would not be bit-identical."""
    a = make(130, N=16, channels=300, dtype=torch.float32)
    assert_threads_change_nothing(lambda: [t for results in run(selective_scan, a, "cpu") for t in results])


@pytest.mark.parametrize("elements, steps", [(1, 1), (120, 4), (1 << 24, 31)])
def test_any_chunk_length_gives_the_same(monkeypatch, elements, steps):
    """Wide layers and large batches go group by group, and only if that is not enough in short chunks."""
    arguments = make(31, **CASES["everything"])
    expected = run(selective_scan, arguments, "reference")
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    assert chunked._chunk_length(2, 1, 3, 5, 31) == steps
    actual = run(selective_scan, arguments, "chunked")
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_formula(impl):
    """y_t = sum_s exp(sum_{s<r<=t} delta_r A) delta_s u_s B_s . C_t, in its quadratic form."""
    a = make(9, N=3, channels=4)
    u, delta, B, C = a["u"], a["delta"], a["B"][:, 0], a["C"][:, 0]
    # [b, d, t, s]
    elapsed = torch.stack(
        [torch.stack([delta[..., s + 1 : t + 1].sum(-1) for s in range(9)], -1) for t in range(9)], -2
    )
    decay = (
        torch.exp(elapsed[..., None] * a["A"][:, None, None]) * torch.ones(9, 9, dtype=torch.float64).tril()[..., None]
    )
    expected = torch.einsum("bdtsn,bds,bns,bnt->bdt", decay, delta * u, B, C)
    assert_close(selective_scan(**a, impl=impl), expected, FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_normalize_divides_by_a_scan_of_ones(impl):
    a = make(40, G=2, R=2, normalize=True, state=True) | dict(normalize=False)
    state = a.pop("initial_state")
    y, last = selective_scan(**(a | dict(normalize=True)), initial_state=state, return_last_state=True, impl=impl)
    num, last_num = selective_scan(**a, initial_state=state[0], return_last_state=True, impl=impl)
    den, last_den = selective_scan(
        **(a | dict(u=torch.ones_like(a["u"]))), initial_state=state[1], return_last_state=True, impl=impl
    )
    assert_close(y, num / (den.abs() + 1e-6), FLOAT64)
    assert_close(last, (last_num, last_den), FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_epsilon_counts_where_the_denominator_is_small(impl):
    """One step from nothing: u d / (d + 1e-6) with d = delta B C = 1e-6 is half of u."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    y = selective_scan(3 * one, 1e-6 * one, -one[0], one, one, normalize=True, impl=impl)
    assert y.item() == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_documents_are_separate_runs(impl):
    """The first continues the state it is given; the last state is the last document's."""
    a = make(50, normalize=True, state=True)
    a["document_ids"] = torch.tensor([4] * 20 + [9] * 30).expand(2, 50)
    y, last = selective_scan(**a, return_last_state=True, impl=impl)
    state = a.pop("initial_state")
    del a["document_ids"]
    parts = [
        {k: v[..., s] if k in ("u", "delta", "B", "C") else v for k, v in a.items()} for s in (slice(20), slice(20, 50))
    ]
    first = selective_scan(**parts[0], initial_state=state, impl=impl)
    second, expected = selective_scan(**parts[1], return_last_state=True, impl=impl)
    assert_close(y, torch.cat([first, second], -1), FLOAT64)
    assert_close(last, expected, FLOAT64)


@pytest.mark.parametrize(
    "options", [dict(state=True), dict(normalize=True, G=2, R=2, documents=True)], ids=["state", "normalized-documents"]
)
def test_gradients_by_finite_differences(monkeypatch, options):
    monkeypatch.setattr(chunked, "MAX_CHUNK", 2)
    a = make(5, N=2, channels=2, **options)
    names = [k for k in ("u", "delta", "A", "B", "C", "initial_state") if k in a]

    def scan(*tensors):
        y, last = selective_scan(**(a | dict(zip(names, tensors, strict=True))), return_last_state=True, impl="chunked")
        return y, *(last if options.get("normalize") else (last,))

    assert torch.autograd.gradcheck(scan, [a[name].requires_grad_() for name in names])


@pytest.mark.parametrize("impl", [CPU, "chunked"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_float32_is_close_to_float64(options, impl):
    arguments = make(127, **options)
    single = make(127, **options, dtype=torch.float32)
    (outputs, gradients), (expected, expected_gradients) = (
        run(selective_scan, single, impl),
        run(selective_scan, arguments, "reference"),
    )
    assert all(o.dtype == torch.float32 for o in outputs)
    assert_close(outputs, expected, FLOAT32)
    assert_close(gradients, expected_gradients, FLOAT32)


def test_bfloat16_keeps_float32_states():
    y, last = selective_scan(**make(8, dtype=torch.bfloat16), return_last_state=True)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_autocast_changes_nothing(impl):
    a = make(70, **CASES["everything"], dtype=torch.float32)
    outside, inside = (
        run(selective_scan, a, impl),
        run(selective_scan, a, impl, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    )
    for o, i in zip(outside, inside, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(o, i, strict=True))


def saved_bytes(function: Callable) -> int:
    """Return the size of the storages that autograd keeps for the backward pass; a view keeps all of its storage."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        kept = function()
    assert kept is not None
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def test_backward_keeps_no_state_per_step():
    """Nothing of size [batch, D, N, L] is kept: only inputs and the states between chunks."""
    batch, channels, N, L = 2, 8, 16, 512
    a = make(L, N=N, channels=channels, dtype=torch.float32)
    a = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    states = 4 * batch * channels * N * L
    assert saved_bytes(lambda: selective_scan(**a, impl="reference")) > states
    inputs = sum(4 * v.numel() for v in a.values() if isinstance(v, torch.Tensor))
    assert saved_bytes(lambda: selective_scan(**a, impl="chunked")) < inputs + states / 32


WRONG = {
    "a list": (dict(A=[[1.0] * 5] * 6), "A must be a tensor; got list"),
    "a pair": (dict(initial_state=(torch.ones(2, 6, 5),) * 2), "initial_state must be a tensor; got tuple"),
    "no groups": (dict(B=torch.ones(2, 0, 5, 8)), r"must divide D .*got D 6, B 0, C 1"),
    "infinite": (dict(A=torch.full((6, 5), -torch.inf)), "A must be finite; got 0 NaN and 30 infinities of 30"),
    "integers": (dict(A=torch.ones(6, 5, dtype=torch.int64)), "A must be floating-point; got torch.int64"),
    "devices": (dict(A=torch.ones(6, 5, device="meta")), "on one device; got u on cpu and A on meta"),
    "no states": (
        dict(A=torch.ones(6, 0), B=torch.ones(2, 0, 8), C=torch.ones(2, 0, 8)),
        r"A must not be empty; got \(6, 0\)",
    ),
    "too many states": (
        dict(A=torch.ones(6, 1025), B=torch.ones(2, 1025, 8), C=torch.ones(2, 1025, 8)),
        "must be at most 1024; got 1025",
    ),
    "NaN": (dict(A=torch.full((6, 5), torch.nan)), "A must be finite; got 30 NaN and 0 infinities of 30"),
    "document_ids of floats": (dict(document_ids=torch.zeros(2, 8)), "whole numbers on cpu; got torch.float32 on cpu"),
    "u and delta": (dict(delta=torch.ones(2, 6, 7)), r"u and delta .*\(2, 6, 8\) and \(2, 6, 7\)"),
    "u empty": (dict(u=torch.ones(2, 6, 0), delta=torch.ones(2, 6, 0)), r"must not be empty; got \(2, 6, 0\)"),
    "A": (dict(A=torch.ones(5, 5)), r"A must be \[D, N\] with D = 6; got \(5, 5\)"),
    "B": (dict(B=torch.ones(2, 1, 4, 8)), r"B must be .*batch 2, N 5, L 8; got \(2, 1, 4, 8\)"),
    "C": (dict(C=torch.ones(2, 1, 5, 9)), r"C must be .*batch 2, N 5, L 8; got \(2, 1, 5, 9\)"),
    "groups of B": (dict(B=torch.ones(2, 4, 5, 8), C=torch.ones(2, 4, 5, 8)), r"must divide D .*got D 6, B 4, C 4"),
    "groups of C": (dict(B=torch.ones(2, 2, 5, 8), C=torch.ones(2, 3, 5, 8)), r"groups of C; got D 6, B 2, C 3"),
    "impl": (dict(impl="cuda"), r"'auto' or one of 'triton', 'cpu', 'chunked', 'reference', 'mamba_ssm'; got 'cuda'"),
    "D": (dict(D=torch.ones(1)), r"D must .*6.*; got \(1,\)"),
    "z": (dict(z=torch.ones(2, 1, 8)), r"z must .*\(2, 6, 8\).*; got \(2, 1, 8\)"),
    "delta_bias": (dict(delta_bias=torch.ones(1)), r"delta_bias must .*6.*; got \(1,\)"),
    "initial_state": (
        dict(initial_state=torch.ones(1, 6, 5)),
        r"initial_state must .*\(2, 6, 5\).*; got .*\(1, 6, 5\)",
    ),
    "initial_state pair": (
        dict(initial_state=torch.ones(2, 6, 5), normalize=True),
        r"initial_state must .*pair.*; got .*\(2, 6, 5\)",
    ),
    "document_ids": (dict(document_ids=torch.zeros(2, 7)), r"document_ids must .*\(2, 8\).*; got \(2, 7\)"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(make(8) | changes))


@pytest.mark.parametrize("tolerance", [1e-12, 2e-6, 5e-6, 1e-5])
def test_comparison_rejects_three_times_its_tolerance(tolerance):
    """Spread over all elements, in one element, and in a shape; within the tolerance it accepts."""
    y = selective_scan(**make(65))
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    size = tolerance * y.square().mean().sqrt()
    assert_close(y + 0.5 * size * noise, y, tolerance)
    one = torch.zeros_like(y)
    one[0, 0, 0] = 1
    for wrong in (y + 3 * size * noise, y + 3 * 20 * size * one, y[..., :-1], y * torch.nan):
        with pytest.raises(AssertionError):
            assert_close(wrong, y, tolerance)


def test_torch_compile_sees_one_operator():
    assert_compiles(selective_scan, make(70, **CASES["everything"], dtype=torch.float32))


@pytest.mark.parametrize("impl", [CPU])
def test_operators_keep_torchs_rules(impl):
    a = make(70, N=16, dtype=torch.float32)
    h = torch.zeros(1, *a["u"].shape[:2], 16)
    selective_scan(**a)  # registers
    arguments = [a[k].requires_grad_() for k in ("u", "delta", "A", "B", "C")]
    torch.library.opcheck(torch.ops.workbench.selective_scan.default, (*arguments, h, None, True))
