"""The chunk scan's matrix products, whose gradients do not depend on where backward() is called, and that keep to what is seen.

autocast belongs to the thread, not to the graph: in a backward() inside it, torch's own products would multiply in bfloat16. And
0 x NaN is NaN: in a plain product with a triangle of zeros, a NaN would reach the steps before it. Each gradient here is one of these
products again, so they can be differentiated any number of times.

a [..., rows, K] · b [..., columns, K] or values [..., columns, P] · seen [..., rows, columns], bool
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import has_values


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, seen):
        ctx.save_for_backward(a, b, seen)
        with torch.autocast(a.device.type, enabled=False):
            return (a @ b.mT).masked_fill(~seen, 0)

    @staticmethod
    def backward(ctx, dscores):
        a, b, seen = ctx.saved_tensors
        return weighted_sum(dscores, b, seen), weighted_sum(dscores.mT, a, seen.mT), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, values, seen):
        ctx.save_for_backward(weights, values, seen)
        with torch.autocast(values.device.type, enabled=False):
            weights, finite = weights.masked_fill(~seen, 0), values.isfinite()
            if has_values(values) and bool(finite.all()):
                return weights @ values
            reached = seen.to(values.dtype) @ (~finite).to(values.dtype) > 0
            return (weights @ values.masked_fill(~finite, 0)).masked_fill(reached, torch.nan)

    @staticmethod
    def backward(ctx, dy):
        weights, values, seen = ctx.saved_tensors
        return scores_of(dy, values, seen), weighted_sum(weights.mT, dy, seen.mT), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx, dy):
        a, b = ctx.saved_tensors
        return product(dy, b.mT), product(a.mT, dy)


def scores_of(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """a b^T where it is seen, 0 elsewhere."""
    return _Scores.apply(a, b, seen)


def weighted_sum(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights values, over the values that a row sees: one that is not finite makes those rows NaN, and no other."""
    return _WeightedSum.apply(weights, values, seen)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of matrices with the same leading dimensions."""
    return _Product.apply(a, b)


def running_sums(t: Tensor) -> Tensor:
    """Of the last dimension. torch promises no determinism of its own on a GPU, and warns or raises where it is asked for."""
    if t.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return t.cumsum(-1)
    return sums_by_doubling(t)


def sums_by_doubling(t: Tensor) -> Tensor:
    """Running sums in passes of twice the reach each."""
    reach = 1
    while reach < t.shape[-1]:
        t = t + F.pad(t, (reach, 0))[..., :-reach]
        reach *= 2
    return t
