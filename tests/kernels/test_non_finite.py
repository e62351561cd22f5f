"""A value that is not finite reaches what the recurrence reaches: no earlier step, other document, batch entry or head.

In gradients it reaches no later step.
"""

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import products
from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan, chunked
from kernels.chunk_scan import cpu as chunk_cpu
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan
from tests.kernels.conftest import CPU

SCANS = {"selective_scan": (selective_scan, selective_cases), "chunk_scan": (chunk_scan, chunk_cases)}
VALUES = (float("nan"), float("inf"), -float("inf"))
STATES = {"selective_scan": "return_last_state", "chunk_scan": "return_final_states"}


def results(
    name: str, a: dict, impl: str, non_finite_weight: tuple[int, float] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and states, and the gradients of their random sum, in which one weight of y may be not finite."""
    leaves = []

    def leaf(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(map(leaf, v))
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        leaves.append(v.detach().clone().requires_grad_())
        return leaves[-1]

    y, last = SCANS[name][0](**{k: leaf(v) for k, v in a.items()}, **{STATES[name]: True}, impl=impl)
    outputs = [y, *(last if isinstance(last, tuple) else (last,))]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]
    if non_finite_weight:
        place, value = non_finite_weight
        weights[0].view(-1)[place % weights[0].numel()] = value
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def kinds(tensors: list[Tensor]) -> list[Tensor]:
    """Map values to their kind: 0 for finite ones, 1 for NaN, 2 and 3 for the infinities."""
    return [t.isnan() + 2 * t.isposinf() + 3 * t.isneginf() for t in tensors]


def draw(name: str, rng: random.Random, length: int, non_finite: bool = True) -> tuple[dict, str]:
    """Draw arguments of a case of the other tests, and the name of the one in which a value is not finite."""
    cases = SCANS[name][1]
    # 0 x infinity there depends on denormal numbers
    case = rng.choice([case for case in cases.CASES if case != "strong-decay"])
    options = dict(cases.CASES[case]) | ({"documents": True} if rng.random() < 0.5 else {})
    a = cases.make(length, N=rng.choice([1, 5, 16, 33]), **options, dtype=rng.choice([torch.float32, torch.float64]))
    floats = [k for k, v in a.items() if isinstance(v, tuple) or (isinstance(v, Tensor) and v.is_floating_point())]
    which = rng.choice([k for k in floats if k != "A"])  # an A that is not finite is refused
    if non_finite:
        tensor = a[which][rng.randrange(2)] if isinstance(a[which], tuple) else a[which]
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(VALUES)
    return a, which


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("impl", [CPU, "chunked"])
@pytest.mark.parametrize("name", SCANS)
def test_each_argument_as_in_the_reference(name, impl, seed):
    """Results and gradients have the same kinds in the same places, and the finite ones are close."""
    rng = random.Random(seed)
    a, which = draw(name, rng, rng.choice([5, 70, 130]))
    for found, wanted in zip(results(name, a, impl), results(name, a, "reference"), strict=True):
        for f, w in zip(found, wanted, strict=True):
            assert all(map(torch.equal, kinds([f]), kinds([w]))), which
            finite = w.isfinite()
            torch.testing.assert_close(
                f[finite], w[finite], rtol=1e-3, atol=1e-3 * float(w[finite].abs().max()) if finite.any() else 0
            )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("impl", [CPU])
def test_one_head_of_a_task_as_in_the_reference(monkeypatch, impl, seed):
    """Its gradients, computed step by step, are added to those of the other heads of the group."""
    monkeypatch.setattr(chunk_cpu, "MIN_TASKS", 1)
    test_each_argument_as_in_the_reference("chunk_scan", impl, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("impl", [CPU])
def test_a_gradient_that_is_not_finite_as_in_the_reference(name, impl, seed):
    rng = random.Random(seed)
    a, _ = draw(name, rng, 130, non_finite=False)
    weight = rng.randrange(10**6), rng.choice(VALUES)
    (_, found), (_, wanted) = (results(name, a, i, weight) for i in (impl, "reference"))
    assert all(map(torch.equal, kinds(found), kinds(wanted)))


@pytest.mark.parametrize("looks", [True, False], ids=["on a CPU", "without a look at values"])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("argument", ["x", "dt", "B", "C"])
def test_chunked_products_are_causal(monkeypatch, looks, argument, value):
    """This also holds on another device or compiled, where no branch depends on a value."""
    if not looks:
        for module in (chunked, products):
            monkeypatch.setattr(module, "can_read_values", lambda t: False)
    a = chunk_cases.make(130, normalize=True, documents=True, state=True)
    before = chunk_scan(**a, impl="chunked")
    t = 77
    a[argument][1, t] = value
    found, wanted = (chunk_scan(**a, impl=impl) for impl in ("chunked", "reference"))
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.allclose(found[0], before[0], rtol=1e-12) and torch.allclose(found[1, :t], before[1, :t], rtol=1e-12)
    border = int((a["document_ids"][1] == a["document_ids"][1, t]).nonzero().max()) + 1
    assert border < 130 and bool(found[1, border:].isfinite().all()) and not bool(found[1, t].isfinite().any())


@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
@pytest.mark.parametrize("name, values, time", [("selective_scan", "u", -1), ("chunk_scan", "x", 1)])
def test_gradients_reach_no_later_step(name, values, time, impl):
    a = SCANS[name][1].make(130)
    leaf = a[values].requires_grad_()
    y = SCANS[name][0](**a, impl=impl)
    weights = torch.ones_like(y)
    weights.select(time, 70).fill_(torch.nan)
    (gradient,) = torch.autograd.grad(y, leaf, weights)
    reached = gradient.movedim(time, 0).flatten(1).isnan()
    assert bool(reached[:71].all()) and not bool(reached[71:].any())


@pytest.mark.parametrize("double", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("impl", [CPU, "chunked", "reference"])
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_gradients_do_not_depend_on_where_backward_is_called(name, impl, compiled, double):
    """autocast belongs to the thread that calls backward(), which is the loop's."""
    scan, cases = SCANS[name]
    if double and (impl == "cpu" or compiled or (name, impl) == ("selective_scan", "chunked")):
        pytest.skip("it is differentiated once")
    a = cases.make(
        3 if impl == "reference" or compiled else 70,
        N=20,
        G=2,
        R=2,
        normalize=True,
        documents=True,
        dtype=torch.float32,
    )
    call = torch.compile(scan, backend="aot_eager", fullgraph=True) if compiled else scan
    found = []
    for inside in (False, True):
        leaves = {
            k: v.detach().clone().requires_grad_()
            for k, v in a.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(**a | leaves, impl=impl).sin().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
            gradients = torch.autograd.grad(loss, [*leaves.values()], create_graph=double)
            if double:
                gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), [*leaves.values()])
        found.append(gradients)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("length", [1, 2, 33, 64])
def test_cumulative_sum_by_doubling(length):
    """A GPU computes them so in deterministic mode, where torch's own would warn, and warnings are errors here."""
    t = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(products.cumulative_sum_by_doubling(t), t.cumsum(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("what", [products.masked_scores, products.weighted_sum])
def test_products_can_be_differentiated_twice(what):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True) for size in ((2, 4, 3), (2, 3, 3)))
    seen = torch.rand(4, 3, generator=g) < 0.6
    assert torch.autograd.gradcheck(lambda a, b: what(a, b, seen), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: what(a, b, seen), (a, b))
