"""Shared by the kernel tests: running an operator with its gradients, and the mark of tests that need a compiler."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.selective_scan.cpu import why_unavailable
from tests.conftest import assert_close

FLOAT64 = 1e-12  # measured: 1.2e-15; 5e-14 for gradients that nearly cancel
FLOAT32 = 1e-5  # measured: 6.5e-7
BFLOAT16 = 1e-2

_reason = why_unavailable("cpu", torch.float32)
needs_compiler = pytest.mark.skipif(_reason is not None, reason=str(_reason))
CPU = pytest.param("cpu", marks=needs_compiler)


def run(
    scan: Callable, arguments: dict, impl: str, forward: Callable[[], AbstractContextManager] = nullcontext
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return outputs and last states, and the gradients of a random projection of both.

    The forward pass runs inside the context manager `forward()`.
    """
    leaves = []

    def leaf(v: Any) -> Any:
        if isinstance(v, tuple):
            return tuple(leaf(item) for item in v)
        if not isinstance(v, Tensor) or not v.is_floating_point():
            return v
        leaves.append(v.detach().requires_grad_())
        return leaves[-1]

    arguments = {name: leaf(v) for name, v in arguments.items()}
    by_argument = {"u": "return_last_state", "x": "return_final_states", "beta": "output_final_state"}
    returned = {option: True for argument, option in by_argument.items() if argument in arguments}
    with forward():
        y, last = scan(**arguments, **returned, impl=impl)
    outputs = [y, *(last if isinstance(last, tuple) else (last,))]
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o) for o in outputs]
    return outputs, torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), leaves)


def assert_compiles(scan: Callable, arguments: dict, impl: str = "auto") -> None:
    """Check that torch.compile takes a scan in one graph, forward and backward, and changes nothing."""
    plain = run(scan, arguments, impl)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(run(compiled, arguments, impl), plain, strict=True):
        assert_close(found, wanted, 1e-6)


def assert_threads_change_nothing(work: Callable[[], list[Tensor]]) -> None:
    """Check that 1, 2 and 3 threads give the same bits, else a resumed run would not be bit-identical."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([t.detach() for t in work()])
    finally:
        torch.set_num_threads(threads)
    first, *others = found
    assert first and all(len(other) == len(first) and all(map(torch.equal, first, other)) for other in others)
