"""Matrix products of scans in chunks: their gradients ignore autocast, and they read only what a mask lets a row see.

autocast belongs to the thread and not to the graph: in a backward() inside it, torch's own products would multiply in
bfloat16. And 0 x NaN is NaN: in a plain product with a triangle of zeros, a NaN would reach the steps before it. Each
gradient here is one of these products again, so they can be differentiated any number of times.

a [..., rows, K] · b [..., columns, K] or values [..., columns, P] · mask [..., rows, columns], bool: what a row sees
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from kernels.checks import can_read_values


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, mask)
        with torch.autocast(a.device.type, enabled=False):
            return (a @ b.mT).masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: FunctionCtx, dscores: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, mask = ctx.saved_tensors
        return weighted_sum(dscores, b, mask), weighted_sum(dscores.mT, a, mask.mT), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weights, values, mask)
        with torch.autocast(values.device.type, enabled=False):
            weights, finite = weights.masked_fill(~mask, 0), values.isfinite()
            if can_read_values(values) and bool(finite.all()):
                return weights @ values
            reached = mask.to(values.dtype) @ (~finite).to(values.dtype) > 0
            return (weights @ values.masked_fill(~finite, 0)).masked_fill(reached, torch.nan)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, values, mask = ctx.saved_tensors
        return masked_scores(dy, values, mask), weighted_sum(weights.mT, dy, mask.mT), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return product(dy, b.mT), product(a.mT, dy)


class _SolveUnitLower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        x = torch.linalg.solve_triangular(a.mT if transposed else a, b, upper=transposed, unitriangular=True)
        ctx.save_for_backward(a, x)
        ctx.transposed = transposed
        return x

    @staticmethod
    def backward(ctx: FunctionCtx, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        a, x = ctx.saved_tensors
        db = _SolveUnitLower.apply(a, dx, not ctx.transposed)
        da = product(x, db.mT) if ctx.transposed else product(db, x.mT)
        return -da.tril(-1), db, None


def solve_unit_lower(a: Tensor, b: Tensor) -> Tensor:
    """Return x with (I + a) x = b, where only what is below a's diagonal is read."""
    return _SolveUnitLower.apply(a, b, False)


def masked_scores(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return a b^T where the mask is true, and 0 elsewhere."""
    return _Scores.apply(a, b, mask)


def weighted_sum(weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return weights @ values over the values that each row sees.

    A value that is not finite makes the rows that see it NaN, and no other.
    """
    return _WeightedSum.apply(weights, values, mask)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, of matrices with the same leading dimensions."""
    return _Product.apply(a, b)


def cumulative_sum(t: Tensor, dim: int = -1) -> Tensor:
    """Return the cumulative sum over a dimension.

    On a GPU torch's own is not deterministic, and warns or raises where determinism is asked for.
    """
    if t.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return t.cumsum(dim)
    return cumulative_sum_by_doubling(t.transpose(dim, -1)).transpose(dim, -1)


def cumulative_sum_by_doubling(t: Tensor) -> Tensor:
    """Return the cumulative sum over the last dimension, in passes that add from twice as far each (Hillis, Steele)."""
    distance = 1
    while distance < t.shape[-1]:
        t = t + F.pad(t, (distance, 0))[..., :-distance]
        distance *= 2
    return t
