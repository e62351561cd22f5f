"""Every implementation equals the reference, and the reference equals the quadratic form of the paper."""

import pytest
import torch

import kernels.chunk_scan.chunked as chunked
import kernels.chunk_scan.cpu as cpu
from kernels.chunk_scan import chunk_scan
from kernels.chunk_scan.cases import CASES, CHANNELS, HEADS, make
from kernels.selective_scan import selective_scan
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
        run(chunk_scan, make(length, **options), i) for i in (impl, "reference")
    )
    assert_close(outputs, expected, FLOAT64)
    assert_close(gradients, expected_gradients, FLOAT64, floor=0.01)


@needs_compiler
@pytest.mark.parametrize("N", [16, 33, 96])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)], ids=["float64", "float32"]
)
def test_compiled_scan_of_many_vectors(N, dtype, tolerance):
    """States and channels that fill several vectors, or do not fill the last one."""
    options = dict(N=N, R=2, normalize=True, documents=True, state=True)
    (outputs, gradients), expected = (
        run(chunk_scan, make(150, **options, dtype=dtype), "cpu"),
        run(chunk_scan, make(150, **options), "reference"),
    )
    assert_close(outputs, expected[0], tolerance)
    assert_close(gradients, expected[1], tolerance)


@needs_compiler
@pytest.mark.parametrize("tasks", [1, 6])
@pytest.mark.parametrize("case", ["plain", "groups", "queries", "everything"])
def test_a_task_of_several_heads(monkeypatch, case, tasks):
    """It adds up their gradients of B and C; 6 tasks are 3 for each batch entry, of one, one and two heads of 4."""
    monkeypatch.setattr(cpu, "MIN_TASKS", tasks)
    found, expected = (run(chunk_scan, make(70, **CASES[case]), impl) for impl in ("cpu", "reference"))
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, FLOAT64)


@needs_compiler
def test_threads_change_nothing(monkeypatch):
    """Sums over the heads of a group have one order, else a resumed run would not be bit-identical."""
    monkeypatch.setattr(cpu, "MIN_TASKS", 4)
    a = make(130, N=16, dtype=torch.float32)
    assert_threads_change_nothing(lambda: [t for results in run(chunk_scan, a, "cpu") for t in results])


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_formula(impl):
    """y_t = sum_s exp(sum_{s<r<=t} dt_r A) (C_t . B_s) dt_s x_s (arXiv 2405.21060, equation 3)."""
    a = make(9, G=2)
    dt = a["dt"]
    # [b, H, t, s]
    elapsed = torch.stack([torch.stack([dt[:, s + 1 : t + 1].sum(1) for s in range(9)], -1) for t in range(9)], -2)
    decay = torch.exp(elapsed * a["A"][:, None, None]) * torch.ones(9, 9, dtype=torch.float64).tril()
    B, C = (a[name].repeat_interleave(2, 2) for name in "BC")
    expected = torch.einsum("bhts,bthn,bshn,bsh,bshp->bthp", decay, C, B, dt, a["x"])
    assert_close(chunk_scan(**a, impl=impl), expected, FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
@pytest.mark.parametrize("queries", [1, 2])
def test_is_a_selective_scan_with_one_decay_per_head(impl, queries):
    """The two kernels agree where both apply; their queries are laid out differently."""
    a = make(70, G=HEADS, R=queries, normalize=True)
    u, delta = a["x"].flatten(2).mT, a["dt"].repeat_interleave(CHANNELS, 2).mT
    A = a["A"].repeat_interleave(CHANNELS)[:, None].expand(-1, 5)
    B, C = (a[name].permute(0, 2, 3, 1) for name in "BC")
    y = selective_scan(u, delta, A, B, C, normalize=True)
    assert_close(chunk_scan(**a, impl=impl).flatten(2).mT, y, FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_normalize_divides_by_a_scan_of_ones(impl):
    a = make(40, G=2, R=2, normalize=True, state=True) | dict(normalize=False, return_final_states=True, impl=impl)
    state = a.pop("initial_states")
    y, last = chunk_scan(**(a | dict(normalize=True)), initial_states=state)
    num, last_num = chunk_scan(**a, initial_states=state[..., :-1])
    den, last_den = chunk_scan(**(a | dict(x=torch.ones_like(a["x"][..., :1]))), initial_states=state[..., -1:])
    assert_close(y, num / (den.abs() + 1e-6), FLOAT64)
    assert_close(last, torch.cat([last_num, last_den], -1), FLOAT64)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_epsilon_counts_where_the_denominator_is_small(impl):
    """One step from nothing: x dt / (dt + 1e-6) with dt B C = 1e-6 is half of x."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = chunk_scan(3 * one, 1e-6 * one[0], -one[0, 0, 0], one, one, normalize=True, impl=impl)
    assert y.item() == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
@pytest.mark.parametrize("border", [20, 64, 70])
def test_documents_are_separate_runs(impl, border):
    """The first continues the given state, and the last state is the last document's; borders in and between chunks."""
    a = make(130, normalize=True, state=True)
    state = a.pop("initial_states")
    ids = torch.tensor([4] * border + [9] * (130 - border)).expand(2, -1)
    y, last = chunk_scan(**a, initial_states=state, document_ids=ids, return_final_states=True, impl=impl)
    parts = [
        {k: v[:, s] if k in ("x", "dt", "B", "C") else v for k, v in a.items()}
        for s in (slice(border), slice(border, None))
    ]
    first = chunk_scan(**parts[0], initial_states=state, impl=impl)
    second, expected = chunk_scan(**parts[1], return_final_states=True, impl=impl)
    assert_close(y, torch.cat([first, second], 1), FLOAT64)
    assert_close(last, expected, FLOAT64)


@pytest.mark.parametrize(
    "options", [dict(state=True), dict(normalize=True, G=2, R=2, documents=True)], ids=["state", "normalized-documents"]
)
def test_gradients_by_finite_differences(monkeypatch, options):
    monkeypatch.setattr(chunked, "CHUNK", 2)
    a = make(5, N=2, **options)
    names = [k for k in ("x", "dt", "A", "B", "C", "initial_states") if k in a]

    def scan(*tensors):
        return chunk_scan(**(a | dict(zip(names, tensors, strict=True))), return_final_states=True, impl="chunked")

    assert torch.autograd.gradcheck(scan, [a[name].requires_grad_() for name in names])


@pytest.mark.parametrize("impl", [CPU, "chunked"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_float32_is_close_to_float64(options, impl):
    single = make(127, **options, dtype=torch.float32)
    (outputs, gradients), (expected, expected_gradients) = (
        run(chunk_scan, single, impl),
        run(chunk_scan, make(127, **options), "reference"),
    )
    assert all(o.dtype == torch.float32 for o in outputs)
    assert_close(outputs, expected, FLOAT32)
    assert_close(gradients, expected_gradients, FLOAT32)


@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_strong_decay_neither_overflows_nor_vanishes(impl):
    """exp(+fall) alone would overflow: 127 steps of decay exp(-50)."""
    a = make(127, normalize=True, dtype=torch.float32)
    a["dt"], a["A"] = torch.full_like(a["dt"], 5.0), torch.full_like(a["A"], -10.0)
    outputs, gradients = run(chunk_scan, a, impl)
    assert_close(outputs[0], a["x"], FLOAT32)  # each token sees itself alone
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_a_state_may_grow(impl):
    """A positive A is not Mamba's, but nothing forbids it."""
    a = make(100) | dict(A=torch.full((HEADS,), 0.01, dtype=torch.float64))
    for found, wanted in zip(run(chunk_scan, a, impl), run(chunk_scan, a, "reference"), strict=True):
        assert_close(found, wanted, FLOAT64)


def test_bfloat16_keeps_float32_states():
    y, last = chunk_scan(**make(8, dtype=torch.bfloat16), return_final_states=True)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_autocast_changes_nothing(impl):
    a = make(70, **CASES["everything"], dtype=torch.float32)
    outside, inside = (
        run(chunk_scan, a, impl),
        run(chunk_scan, a, impl, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    )
    for o, i in zip(outside, inside, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(o, i, strict=True))


def saved_numbers(L: int, impl: str, **options: int) -> int:
    """Count the numbers in the storages that autograd keeps for the backward pass; a view keeps all of its storage."""
    a = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in make(L, **options, dtype=torch.float32).items()
    }
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t
    ):
        kept = chunk_scan(**a, impl=impl)
    assert kept is not None
    return sum(t.untyped_storage().nbytes() for t in storages.values()) // 4


def test_backward_keeps_nothing_quadratic_in_length(monkeypatch):
    options = dict(N=4, R=2, normalize=True)
    at_256, at_512 = (saved_numbers(L, "chunked", **options) for L in (256, 512))
    assert at_512 < 2.05 * at_256
    monkeypatch.setattr(chunked, "CHUNK", 512)  # one chunk is the quadratic form: the measure sees it
    assert saved_numbers(512, "chunked", **options) > 2 * HEADS * 512 * 512 > at_512


@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_groups_are_not_repeated(impl):
    """What is kept of a B and a C for each head, beyond one for all of them, are those of the other heads."""
    shared, own = (saved_numbers(128, impl, N=32, G=G) for G in (1, HEADS))
    assert own - shared >= 2 * 2 * 128 * (HEADS - 1) * 32


WRONG = {
    "a chunk size": (dict(D=256), "D must be a tensor; got int"),
    "no groups": (dict(B=torch.ones(2, 8, 0, 5)), r"must divide H; .* got H 4, B 0, C 1"),
    "integers": (dict(A=torch.ones(4, dtype=torch.int64)), "A must be floating-point; got torch.int64"),
    "devices": (dict(A=torch.ones(4, device="meta")), "on one device; got x on cpu and A on meta"),
    "too many states": (
        dict(B=torch.ones(2, 8, 1, 1025), C=torch.ones(2, 8, 1, 1025)),
        "must be at most 1024; got 1025",
    ),
    "NaN": (dict(A=torch.tensor([0, 0, torch.nan, -1])), "A must be finite; got 1 NaN and 0 infinities of 4"),
    "document_ids of floats": (dict(document_ids=torch.zeros(2, 8)), "whole numbers on cpu; got torch.float32 on cpu"),
    "x": (dict(x=torch.ones(2, 8, 4)), r"x must be \[batch, L, H, P\], not empty; got \(2, 8, 4\)"),
    "x empty": (dict(x=torch.ones(2, 0, 4, 3)), r"not empty; got \(2, 0, 4, 3\)"),
    "dt": (dict(dt=torch.ones(2, 7, 4)), r"dt must be \[batch, L, H\] = \(2, 8, 4\) and A \[H\]; got \(2, 7, 4\)"),
    "A": (dict(A=torch.ones(4, 5)), r"A \[H\]; got \(2, 8, 4\) and \(4, 5\)"),
    "B": (dict(B=torch.ones(2, 7, 1, 5)), r"B must be .* batch 2, L 8; got \(2, 7, 1, 5\)"),
    "C": (dict(C=torch.ones(2, 8, 1, 6)), r"C must be .* batch 2, L 8; got \(2, 8, 1, 6\)"),
    "groups of B": (dict(B=torch.ones(2, 8, 3, 5), C=torch.ones(2, 8, 3, 5)), r"must divide H; .* got H 4, B 3, C 3"),
    "groups of C": (dict(B=torch.ones(2, 8, 2, 5), C=torch.ones(2, 8, 3, 5)), r"those of C .* got H 4, B 2, C 3"),
    "impl": (dict(impl="cuda"), r"'auto' or one of 'triton', 'cpu', 'chunked', 'reference', 'mamba_ssm'; got 'cuda'"),
    "D": (dict(D=torch.ones(8)), r"D must .*4.*; got \(8,\)"),
    "initial_states": (
        dict(initial_states=torch.ones(1, 4, 5, 3)),
        r"initial_states must .*\(2, 4, 5, 3\).*; got \(1, 4, 5, 3\)",
    ),
    "initial_states normalized": (
        dict(initial_states=torch.ones(2, 4, 5, 3), normalize=True),
        r"initial_states must .*\(2, 4, 5, 4\).*; got \(2, 4, 5, 3\)",
    ),
    "document_ids": (dict(document_ids=torch.zeros(2, 7)), r"document_ids must .*\(2, 8\).*; got \(2, 7\)"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        chunk_scan(**(make(8) | changes))


def test_torch_compile_sees_one_operator():
    assert_compiles(chunk_scan, make(70, **CASES["everything"], dtype=torch.float32))


@pytest.mark.parametrize("impl", [CPU])
def test_operators_keep_torchs_rules(impl):
    x, B, C = torch.randn(2, 70, 3, 4), torch.randn(2, 70, 3, 5), torch.randn(2, 70, 3, 1, 5)
    chunk_scan(x, torch.ones(2, 70, 3), torch.zeros(3), B, B)  # registers
    arguments = [t.requires_grad_() for t in (x, -torch.rand(2, 70, 3), B, C, torch.zeros(2, 3, 5, 4))]
    torch.library.opcheck(torch.ops.workbench.chunk_scan.default, (*arguments, None, True))


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
def test_an_id_that_comes_back_is_another_document(impl):
    a = make(6, dtype=torch.float64)
    back, other = torch.tensor([0, 0, 1, 1, 0, 0]).expand(2, 6), torch.tensor([0, 0, 1, 1, 2, 2]).expand(2, 6)
    assert_close(
        chunk_scan(**a, document_ids=back, impl=impl), chunk_scan(**a, document_ids=other, impl="reference"), FLOAT64
    )
