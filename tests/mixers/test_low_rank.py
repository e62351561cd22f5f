"""Maps of two factors, orthonormal columns, and SS2D with a transition of low rank."""

import pytest
import torch
from torch import nn

from convert.mixers.low_rank import LowRankMap, convolution, kept_rank, linear, matrix_of, orthonormal, set_matrix
from convert.mixers.ss2d import SS2D
from convert.mixers.ss2d_lowrank import LowRankSS2D
from convert.mixers.ss2d_states import mean_transition
from convert.models.vision.scans import operations_of, recorded, scan_of
from kernels.ss2d.reference import DIRECTIONS, to_image, transition
from tests.conftest import assert_close


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(ratio: float = 0.5, transition_rank: int = 2, N: int = 4, width: int = 6, inner: int = 7) -> LowRankSS2D:
    torch.manual_seed(0)
    mixer = LowRankSS2D(width, inner, N, 2, True, ratio, transition_rank)
    mixer.start()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer.double()


def diagonal(N: int = 4) -> SS2D:
    torch.manual_seed(0)
    mixer = SS2D(6, 7, N, 2, True)
    mixer.start()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer.double()


@pytest.mark.parametrize("m, n", [(8, 8), (64, 128), (80, 5), (1, 9), (7, 1)])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.65, 0.999])
def test_the_ratio_is_of_the_numbers_that_are_kept(m, n, ratio):
    r = kept_rank(m, n, ratio)
    assert r == 1 or r * (m + n) <= ratio * m * n + 1e-6 < (r + 1) * (m + n)
    made = sum(p.numel() for p in linear(n, m, ratio, bias=False).parameters())
    assert made == min(r * (m + n), m * n)
    assert isinstance(linear(n, m, 1.0), nn.Linear) and kept_rank(m, n, 1.0) == min(m, n)


def test_factors_are_those_of_the_largest_singular_values():
    W, bias = normal(6, 9), normal(6)
    layer = linear(9, 6, 0.9).double()
    set_matrix(layer, W, bias)
    r, (U, S, Vh) = layer.up.weight.shape[1], torch.linalg.svd(W, full_matrices=False)
    assert isinstance(layer, LowRankMap) and r == 3
    assert_close(matrix_of(layer), U[:, :3] * S[:3] @ Vh[:3], 1e-12)
    assert_close(layer.up.weight.T @ layer.up.weight, layer.down.weight @ layer.down.weight.T, 1e-12)
    x = normal(2, 9)
    assert_close(layer(x), x @ matrix_of(layer).T + bias, 1e-12)


@pytest.mark.parametrize("stride, size", [(2, (9, 12)), (1, (5, 4))])
def test_a_convolution_of_two_factors_is_that_of_its_matrix(stride, size):
    layer, whole = convolution(4, 10, 3, stride, 1, 0.5).double(), nn.Conv2d(4, 10, 3, stride, 1).double()
    set_matrix(layer, normal(10, 36), normal(10, seed=1))
    set_matrix(whole, matrix_of(layer), normal(10, seed=1))
    x = normal(2, 4, *size, seed=2)
    assert isinstance(layer, LowRankMap)
    assert_close(layer(x), whole(x), 1e-12)


@pytest.mark.parametrize("n, r", [(1, 1), (5, 2), (8, 8)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_are_orthonormal_whatever_they_are_made_of(n, r, scale):
    W = scale * normal(3, n, r)
    Q = orthonormal(W)
    assert_close(Q.mT @ Q, torch.eye(r).double().expand(3, -1, -1), 1e-14)
    assert_close(orthonormal(Q), Q, 1e-14)
    upper = Q.mT @ W  # the columns are those of W, one after the other: Q R is W with R above the diagonal
    assert_close(Q @ upper.triu(), W, 1e-12)
    single = orthonormal(W.float())
    assert_close(single.mT @ single, torch.eye(r).expand(3, -1, -1), 1e-6)
    assert torch.autograd.gradcheck(orthonormal, (normal(2, n, r).requires_grad_(),), fast_mode=True)


def test_nearly_dependent_columns_are_orthonormal_in_float32():
    W = normal(1, 6, 1).expand(-1, -1, 4) + 1e-4 * normal(1, 6, 4, seed=1)
    Q = orthonormal(W.float())
    assert_close(Q.mT @ Q, torch.eye(4)[None], 1e-6)


def test_no_transition_grows_whatever_the_parameters_are():
    mixer = low_rank()
    with torch.no_grad():
        for p in (mixer.U_columns, mixer.V_columns, mixer.sigma_logit):
            p.mul_(1e3)
    assert torch.linalg.matrix_norm(transition(*mixer.transition()), 2).max() <= 1 + 1e-12


def test_full_rank_holds_any_transition():
    A, mixer = 0.1 * normal(DIRECTIONS, 4, 4), low_rank(1.0, 4)
    U, S, Vh = torch.linalg.svd(A)
    mixer.set_transition(U, S, Vh.mT)
    assert_close(transition(*mixer.transition()), A, 1e-12)


@pytest.mark.parametrize("make", [low_rank, diagonal])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 7), (4, 4)])
def test_states_are_what_the_outputs_are_read_from(make, size):
    mixer = make()
    with recorded(mixer) as calls:
        mixer(normal(2, *size, 6))
    ((scan, given),) = calls
    states = scan_of(scan, given).states()
    C, without_D = given[-3], (*given[:-2], torch.zeros_like(given[-2]), given[-1])
    y = 0.0
    for k in range(DIRECTIONS):
        seen = (states[:, k] @ _sequence(C[:, k], k).unsqueeze(-1)).squeeze(-1)  # [B, L, E]
        y = y + to_image(seen.mT, k, *size)
    assert_close(y, scan(*without_D), 1e-12)


def _sequence(t: torch.Tensor, k: int) -> torch.Tensor:
    """t [B, N, H, W] as [B, L, N] in the order of a direction, place by place."""
    _, _, H, W = t.shape
    places = [(i // W, i % W) if k % 2 == 0 else (i % H, i // H) for i in range(H * W)]
    return torch.stack([t[:, :, i, j] for i, j in (places if k < 2 else reversed(places))], 1)


def test_the_mean_transition_is_the_nearest_of_all_channels():
    A, bias = -normal(DIRECTIONS, 5, 4).abs(), normal(DIRECTIONS, 5, seed=1)
    U, sigma, V = mean_transition(A, bias)
    wanted = torch.exp(torch.nn.functional.softplus(bias)[..., None] * A).mean(1)
    assert_close(transition(U, sigma, V), torch.diag_embed(wanted), 1e-12)
    assert (sigma.diff() <= 0).all()


@pytest.mark.parametrize("make", [low_rank, lambda: low_rank(1.0, 4), diagonal], ids=["half", "full", "diagonal"])
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_gradients_reach_every_parameter_and_are_those_of_differences(make, size):
    mixer = make()
    x = normal(1, *size, 6).requires_grad_()
    names = [name for name, _ in mixer.named_parameters()]

    def y(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(y, (x, *mixer.parameters()), fast_mode=True)
    gradients = torch.autograd.grad(y(x, *mixer.parameters()).square().sum(), list(mixer.parameters()))
    if size != (1, 1):  # one place has no place before it
        assert all(g.abs().max() > 0 for g in gradients)


def test_float32_is_close_to_float64():
    mixer, x = low_rank(), normal(2, 5, 4, 6)
    wanted = mixer(x)
    assert_close(mixer.float()(x.float()), wanted, 1e-5)


def test_operations_by_hand():
    for make, wanted in ((low_rank, 2 * (7 * (4 + 4 + 1) + 4 * 5)), (diagonal, 9 * 7 * 4)):
        with recorded(mixer := make()) as calls:
            mixer(normal(2, 3, 5, 6))
        assert operations_of(*calls[0]) == 4 * 2 * 15 * wanted
