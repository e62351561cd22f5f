"""The scan of low rank: every implementation equals the reference, and the reference the dense recurrence."""

import pytest
import torch

from kernels.ss2d import lowrank_cpu, ss2d, ss2d_lowrank
from kernels.ss2d.cases import LOWRANK_CASES, SIZES, make
from kernels.ss2d.reference import to_image, to_sequence, transition
from tests.conftest import assert_close
from tests.kernels.conftest import CPU, FLOAT32, FLOAT64, assert_threads_change_nothing, needs_compiler
from tests.kernels.ss2d.test_ss2d import run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", LOWRANK_CASES.values(), ids=LOWRANK_CASES)
@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_each_is_the_reference(options, size, impl):
    (y, gradients), (wanted, wanted_gradients) = (
        run(make(*size, **options), i, ss2d_lowrank) for i in (impl, "reference")
    )
    assert_close(y, wanted, FLOAT64)
    assert_close(gradients, wanted_gradients, FLOAT64, floor=0.01)


@pytest.mark.parametrize("impl", [CPU, "chunked"])
@pytest.mark.parametrize("options", LOWRANK_CASES.values(), ids=LOWRANK_CASES)
def test_float32_is_close_to_float64(options, impl):
    y, gradients = run(make(11, 13, **options, dtype=torch.float32), impl, ss2d_lowrank)
    wanted, wanted_gradients = run(make(11, 13, **options), "reference", ss2d_lowrank)
    assert y.dtype == torch.float32
    assert_close(y, wanted, FLOAT32)
    assert_close(gradients, wanted_gradients, FLOAT32, floor=0.01)


@needs_compiler
@pytest.mark.parametrize("layout", ["channels last", "neither"])
def test_any_layout_gives_the_same(layout):
    """150 channels are three blocks, the last of which is not full."""
    options = dict(N=20, r=18, channels=150, bias=True)
    arguments = make(9, 14, **options)
    y, gradients = run(arguments, "reference", ss2d_lowrank)
    for name in ("x", "delta"):
        if layout == "channels last":
            arguments[name] = arguments[name].movedim(-3, -1).contiguous().movedim(-1, -3)
        else:
            arguments[name] = arguments[name].repeat_interleave(2, -1)[..., ::2]
    found, found_gradients = run(arguments, "cpu", ss2d_lowrank)
    assert_close(found, y, FLOAT64)
    assert_close(found_gradients, gradients, FLOAT64)


@needs_compiler
def test_threads_change_nothing():
    """Sums over channels have one order, else a resumed run would not be bit-identical."""
    a = make(9, 12, r=4, channels=150, dtype=torch.float32)

    def of_all() -> list[torch.Tensor]:
        y, gradients = run(a, "cpu", ss2d_lowrank)
        return [y, *gradients]

    assert_threads_change_nothing(of_all)


@needs_compiler
def test_what_is_kept_for_the_backward_pass_is_of_the_size_of_the_arguments():
    """The states before each 64 places, and r + r + 1 numbers for each place: less than the image and B and C."""
    a = make(24, 24, N=16, r=8, channels=64, dtype=torch.float32)
    a = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    given = {v.data_ptr(): 4 * v.numel() for v in a.values() if isinstance(v, torch.Tensor)}
    storages: dict[int, int] = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ss2d_lowrank(**a, impl="cpu")
    own = sum(size for address, size in storages.items() if address not in given)
    assert y.requires_grad and own < sum(given.values())


@needs_compiler
def test_both_languages_have_the_same_sizes():
    library = lowrank_cpu.compiled_library()
    sizes = library.chunk_places(), library.span_places(), library.block_channels()
    assert sizes == (lowrank_cpu.CHUNK, lowrank_cpu.SPAN, lowrank_cpu.CHANNELS)


def test_bfloat16_is_computed_in_float32_and_autocast_changes_nothing():
    assert ss2d_lowrank(**make(6, 7, r=2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    a = make(6, 7, r=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ss2d_lowrank(**a)
    assert torch.equal(inside, ss2d_lowrank(**a))


@needs_compiler
def test_operators_keep_torchs_rules():
    g = torch.Generator().manual_seed(0)
    sizes = (2, 6, 3, 5), (2, 4, 6, 3, 5), (4, 9, 2, 2), (2, 4, 15, 5)
    x, delta, powers, rows = (torch.randn(*size, generator=g).requires_grad_() for size in sizes)
    ss2d_lowrank(**make(3, 5, r=2))  # compiles
    torch.library.opcheck(torch.ops.workbench.ss2d_lowrank.default, (x, delta, powers, rows, True))


def test_the_reference_is_a_sum_over_pairs_of_places():
    """y_t = sum over s <= t of C_t^T A^(t-s) B_s x_s, in each direction."""
    a = make(3, 4, r=2)
    A, y = transition(a["U"], a["sigma"], a["V"]), 0
    for k in range(4):
        x, B, C = (to_sequence(t, k) for t in (a["x"], a["B"][:, k], a["C"][:, k]))
        parts = []
        for t in range(12):
            terms = [(C[..., t] @ torch.linalg.matrix_power(A[k], t - s) * B[..., s]).sum(-1) for s in range(t + 1)]
            parts.append(sum(term[:, None] * x[..., s] for s, term in enumerate(terms)))
        y = y + to_image(torch.stack(parts, -1), k, 3, 4)
    assert_close(ss2d_lowrank(**a, impl="reference"), y, 1e-12)


def test_a_diagonal_transition_of_full_rank_is_the_scan_with_constant_decays():
    """With U = V = 1, sigma is the decay of each state: exp(delta A) of the diagonal scan with delta = 1."""
    a = make(6, 7, N=4, r=4)
    one = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    A = a["sigma"].log()[:, None].expand(-1, 6, -1)
    wanted = ss2d(a["x"], torch.ones(2, 4, 6, 6, 7, dtype=torch.float64), A, a["B"], a["C"], impl="reference")
    assert_close(ss2d_lowrank(**a | dict(U=one, V=one)), wanted, FLOAT64)


def test_no_state_grows_with_orthonormal_factors():
    a = make(40, 50, N=8, r=8, dtype=torch.float32)
    a["sigma"] = torch.full((4, 8), 0.999)
    y = ss2d_lowrank(**a)
    assert y.isfinite().all() and y.abs().max() < 1e4


def test_turning_the_image_exchanges_directions():
    a = make(6, 9, r=2)
    y = ss2d_lowrank(**a)
    order = [1, 0, 3, 2]
    b = {k: a[k].mT for k in ("x",)} | {k: a[k].mT[:, order] for k in ("B", "C")} | {k: a[k][order] for k in "UV"}
    assert_close(ss2d_lowrank(**b, sigma=a["sigma"][order]), y.mT, FLOAT64)


def test_gradients_by_finite_differences_once_and_twice():
    a = make(1, 3, N=2, r=1, channels=1, batch=1)
    tensors = [v.requires_grad_() for v in a.values() if isinstance(v, torch.Tensor)]
    assert torch.autograd.gradcheck(lambda *t: ss2d_lowrank(*t, impl="chunked"), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ss2d_lowrank(*t, impl="chunked"), tensors)


@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_torch_compile_takes_it_in_one_graph(impl):
    a = make(2, 4, r=2, bias=True, dtype=torch.float32)
    compiled = torch.compile(ss2d_lowrank, backend="aot_eager", fullgraph=True)
    (y, gradients), (wanted, wanted_gradients) = run(a, impl, compiled), run(a, impl, ss2d_lowrank)
    assert_close(y, wanted, 1e-6)
    assert_close(gradients, wanted_gradients, 1e-5, floor=0.01)


WRONG = {
    "rank": (dict(make(4, 5, N=2, r=2), U=torch.ones(4, 2, 3), V=torch.ones(4, 2, 3), sigma=torch.ones(4, 3)), "The rank must be at most N; got a rank of 3 for N = 2"),  # noqa: E501
    "factors": (dict(V=torch.ones(4, 5, 3)), r"U and V must be \[4, N, r\], and sigma \[4, r\]; got \(4, 5, 2\), \(4, 5, 3\)"),  # noqa: E501
    "sigma": (dict(sigma=torch.ones(2)), r"U and V must be .* and \(2,\)"),
    "B": (dict(B=torch.ones(2, 4, 4, 4, 5)), r"B must be \(2, 4, 5, 4, 5\) to fit the others; got \(2, 4, 4, 4, 5\)"),
    "bias": (dict(delta_bias=torch.ones(4, 6)), "delta_bias is added to delta; there is none"),
    "softplus": (dict(delta_softplus=True), "delta_softplus is of delta; there is none"),
    "delta": (dict(delta=torch.ones(2, 6, 4, 5)), r"delta must be \(2, 4, 6, 4, 5\) to fit .*; got \(2, 6, 4, 5\)"),
    "impl": (dict(impl="cuda"), r"'auto' or one of 'triton', 'cpu', 'chunked', 'reference'; got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ss2d_lowrank(**(make(4, 5, r=2) | changes))
