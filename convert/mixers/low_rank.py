"""Linear maps as the product of two, of a rank that costs what a ratio keeps, and matrices with orthonormal columns.

m x n matrix · r rank · K batch of matrices
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.dispatch import without_autocast


def kept_rank(m: int, n: int, ratio: float) -> int:
    """The largest rank at which two factors of an m x n matrix have at most `ratio` of its numbers, and 1 at least:
    ratio m n / (m + n). Where the ratio is 1, the full rank: such a matrix needs no factors."""
    return min(m, n) if ratio >= 1 else max(1, int(ratio * m * n / (m + n) + 1e-9))


class LowRankMap(nn.Module):
    """Two linear maps, one after the other: `down` to r channels, and `up` from them."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up
        for factor in (down, up):
            factor.factor_rank = up.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def factor_std(layer: nn.Module, std: float) -> float:
    """The deviation of the random numbers of a layer: `std`, or that of each of two factors for a product of `std`."""
    r = getattr(layer, "factor_rank", None)
    return std if r is None else (std / r**0.5) ** 0.5


def linear(n: int, m: int, ratio: float, bias: bool = True) -> nn.Module:
    """A linear map of n channels to m whose matrix has at most `ratio` of m n numbers; one matrix where two would have
    no fewer."""
    r = kept_rank(m, n, ratio)
    if ratio >= 1 or r * (m + n) >= m * n:
        return nn.Linear(n, m, bias)
    return LowRankMap(nn.Linear(n, r, bias=False), nn.Linear(r, m, bias))


def convolution(channels: int, width: int, kernel: int, stride: int, padding: int, ratio: float) -> nn.Module:
    """A convolution whose width x (channels kernel^2) matrix has at most `ratio` of its numbers: one to r channels, and
    one of 1 x 1."""
    m, n = width, channels * kernel**2
    r = kept_rank(m, n, ratio)
    if ratio >= 1 or r * (m + n) >= m * n:
        return nn.Conv2d(channels, width, kernel, stride, padding)
    return LowRankMap(nn.Conv2d(channels, r, kernel, stride, padding, bias=False), nn.Conv2d(r, width, 1))


def matrix_of(layer: nn.Module) -> Tensor:
    """The m x n matrix of a linear map or a convolution, of one factor or two."""
    if isinstance(layer, LowRankMap):
        return matrix_of(layer.up) @ matrix_of(layer.down)
    return layer.weight.flatten(1)


@torch.no_grad()
def set_matrix(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> None:
    """Give a linear map or a convolution this m x n matrix, or the nearest of its rank: U sqrt(S) and sqrt(S) V^T of
    the largest singular values."""
    last = layer
    if isinstance(layer, LowRankMap):
        last, r = layer.up, layer.up.weight.shape[1]
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        root = S[:r].sqrt()
        layer.up.weight.copy_((U[:, :r] * root).view_as(layer.up.weight))
        layer.down.weight.copy_((root[:, None] * Vh[:r]).view_as(layer.down.weight))
    else:
        layer.weight.copy_(matrix.view_as(layer.weight))
    if bias is not None:
        last.bias.copy_(bias)


def orthonormal(W_Knr: Tensor) -> Tensor:
    """The columns of W [K, n, r], r <= n, made orthonormal from the first to the last (Gram-Schmidt, twice for each, so
    that rounding alone is left). Columns that are orthonormal stay as they are. In float32 or better.

    Written in operators that every exporter knows; a linearly dependent column gives zeros or rounding."""
    found: list[Tensor] = []
    with without_autocast(W_Knr.device.type):
        for w in W_Knr.to(torch.promote_types(W_Knr.dtype, torch.float32)).unbind(-1):
            for _ in range(2 * bool(found)):
                Q, w = torch.stack(found, -1), F.normalize(w, dim=-1)
                w = w - (Q @ (Q.mT @ w[..., None])).squeeze(-1)
            found.append(F.normalize(w, dim=-1))
    return torch.stack(found, -1)


def largest(U: Tensor, sigma: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values [K, r] of U diag(sigma) V^T, the largest first, between their singular vectors
    [K, n, r]."""
    sigma, kept = sigma.topk(r, -1)
    U, V = (side.gather(2, kept[:, None].expand(-1, side.shape[1], -1)) for side in (U, V))
    return U, sigma, V
