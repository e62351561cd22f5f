"""A case of `kernels.bench`: sizes, least work, implementations and a reference; and which baselines run here."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.machine import DEVICE

BASELINES = {  # package -> its module
    "mambapy": "mambapy",
    "transformers": "transformers",
    "mamba-ssm": "mamba_ssm",
    "flash-linear-attention": "fla",
}
GPU_ONLY = ("mamba-ssm", "flash-linear-attention")
OURS = "triton" if DEVICE == "cuda" else "auto"  # "auto" may be theirs on a GPU, by an earlier bench
BY_IMPL = "mamba-ssm, by impl"  # what runs as impl="mamba_ssm" of our operator

Size = dict[str, int]
Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cost:
    """The least work that the definition needs.

    bytes: inputs and results, once; operations: multiplications and additions.
    """

    bytes: int
    operations: int
    exponentials: int


@dataclass(frozen=True)
class BenchmarkCase:
    """One operator at one size, with all that is measured on it."""

    size: Size
    check_size: Size  # the size at which results are compared with float64
    scaling: tuple[str, tuple[int, ...]]  # the part of the size that the scaling table varies, and its values
    cost: dict[str, Cost]  # by pass: "forward" and, where there are gradients, "backward"
    make_arguments: Callable[[], Tensors]  # in float32
    implementations: dict[str, Run]  # the first is ours; the name of a baseline begins with its package
    reference: Run
    size_limits: dict[str, Size] = field(default_factory=dict)  # implementation -> the largest size that it can take

    @property
    def has_gradients(self) -> bool:
        return "backward" in self.cost

    def results(self, run: Run, arguments: Tensors) -> list[Tensor]:
        """Return the results of an implementation, and all gradients where the case has them."""
        if not self.has_gradients:
            with torch.no_grad():
                return [*run(arguments)]
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        y = run(leaves)
        assert isinstance(y, Tensor)  # as in all cases that have gradients
        return [y.detach(), *torch.autograd.grad(y, [*leaves.values()], output_gradient(y))]


def output_gradient(y: Tensor) -> Tensor:
    """Return a random gradient of y, the same for every implementation and dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def why_not_measured(baseline: str) -> str | None:
    """Return why a baseline is not measured on this machine, or None if it is."""
    if importlib.util.find_spec(BASELINES[baseline]) is None:
        return "not installed"
    return "needs a GPU" if baseline in GPU_ONLY and DEVICE == "cpu" else None


def measured(implementations: dict[str, Run]) -> dict[str, Run]:
    """Leave out the baselines that are not measured on this machine."""
    packages = {name: name.split(",")[0] for name in implementations}
    return {
        name: run
        for name, run in implementations.items()
        if packages[name] not in BASELINES or why_not_measured(packages[name]) is None
    }


@functools.cache
def imported(module: str, name: str) -> Callable:
    """Import a function of a baseline in the process that measures it: a failing import stops no other baseline."""
    return getattr(importlib.import_module(module), name)


@functools.cache
def from_transformers(model: str, name: str) -> Callable:
    """Import transformers' path in torch operators; the function itself may be replaced by that of mamba-ssm."""
    return inspect.unwrap(imported(f"transformers.models.{model}.modeling_{model}", name))


def normal_generator() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator).to(DEVICE)
