"""The scan of low rank: every implementation equals the reference, and the reference the dense recurrence."""

import pytest
import torch

from kernels.ss2d import ss2d, ss2d_lowrank
from kernels.ss2d.cases import LOWRANK_CASES, SIZES, make_lowrank
from kernels.ss2d.reference import to_image, to_sequence, transition
from tests.conftest import assert_close
from tests.kernels.conftest import FLOAT32, FLOAT64
from tests.kernels.ss2d.test_ss2d import run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", LOWRANK_CASES.values(), ids=LOWRANK_CASES)
def test_the_chunks_are_the_reference(options, size):
    arguments = make_lowrank(*size, **options)
    (y, gradients), (wanted, wanted_gradients) = (run(arguments, i, ss2d_lowrank) for i in ("chunked", "reference"))
    assert_close(y, wanted, FLOAT64)
    assert_close(gradients, wanted_gradients, FLOAT64, floor=0.01)


@pytest.mark.parametrize("options", LOWRANK_CASES.values(), ids=LOWRANK_CASES)
def test_float32_is_close_to_float64(options):
    y, gradients = run(make_lowrank(11, 13, **options, dtype=torch.float32), "auto", ss2d_lowrank)
    wanted, wanted_gradients = run(make_lowrank(11, 13, **options), "reference", ss2d_lowrank)
    assert y.dtype == torch.float32
    assert_close(y, wanted, FLOAT32)
    assert_close(gradients, wanted_gradients, FLOAT32, floor=0.01)


def test_the_reference_is_a_sum_over_pairs_of_places():
    """y_t = sum over s <= t of C_t^T A^(t-s) B_s x_s, in each direction."""
    a = make_lowrank(3, 4, N=5, r=2)
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
    a = make_lowrank(6, 7, N=4, r=4)
    one = torch.eye(4, dtype=torch.float64).expand(4, -1, -1)
    A = a["sigma"].log()[:, None].expand(-1, 6, -1)
    wanted = ss2d(a["x"], torch.ones(2, 4, 6, 6, 7, dtype=torch.float64), A, a["B"], a["C"], impl="reference")
    assert_close(ss2d_lowrank(**a | dict(U=one, V=one)), wanted, FLOAT64)


def test_no_state_grows_with_orthonormal_factors():
    a = make_lowrank(40, 50, N=8, r=8, dtype=torch.float32)
    a["sigma"] = torch.full((4, 8), 0.999)
    y = ss2d_lowrank(**a)
    assert y.isfinite().all() and y.abs().max() < 1e4


def test_turning_the_image_exchanges_directions():
    a = make_lowrank(6, 9)
    y = ss2d_lowrank(**a)
    order = [1, 0, 3, 2]
    b = {k: a[k].mT for k in ("x",)} | {k: a[k].mT[:, order] for k in ("B", "C")} | {k: a[k][order] for k in "UV"}
    assert_close(ss2d_lowrank(**b, sigma=a["sigma"][order]), y.mT, FLOAT64)


def test_gradients_by_finite_differences():
    a = make_lowrank(2, 3, N=3, r=2, channels=2, batch=1)
    tensors = [v.requires_grad_() for v in a.values() if isinstance(v, torch.Tensor)]
    assert torch.autograd.gradcheck(ss2d_lowrank, tensors)


def test_torch_compile_takes_it_in_one_graph():
    a = make_lowrank(4, 9, dtype=torch.float32)
    compiled = torch.compile(ss2d_lowrank, backend="aot_eager", fullgraph=True)
    (y, gradients), (wanted, wanted_gradients) = run(a, "auto", compiled), run(a, "auto", ss2d_lowrank)
    assert_close(y, wanted, 1e-6)
    assert_close(gradients, wanted_gradients, 1e-5, floor=0.01)


WRONG = {
    "rank": (dict(make_lowrank(4, 5, N=2, r=2), U=torch.ones(4, 2, 3), V=torch.ones(4, 2, 3), sigma=torch.ones(4, 3)), "The rank must be at most N; got a rank of 3 for N = 2"),  # noqa: E501
    "factors": (dict(V=torch.ones(4, 5, 3)), r"U and V must be \[4, N, r\], and sigma \[4, r\]; got \(4, 5, 2\), \(4, 5, 3\)"),  # noqa: E501
    "sigma": (dict(sigma=torch.ones(2)), r"U and V must be .* and \(2,\)"),
    "B": (dict(B=torch.ones(2, 4, 4, 4, 5)), r"B must be \(2, 4, 5, 4, 5\) to fit the others; got \(2, 4, 4, 4, 5\)"),
    "bias": (dict(delta_bias=torch.ones(4, 6)), "delta_bias is added to delta; there is none"),
    "softplus": (dict(delta_softplus=True), "delta_softplus is of delta; there is none"),
    "impl": (dict(impl="cpu"), r"'auto' or one of 'chunked', 'reference'; got 'cpu'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ss2d_lowrank(**(make_lowrank(4, 5) | changes))
