"""Cases of `kernels.bench`: their sizes and least work, our implementation, every baseline, and the reference."""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.chunk_scan import chunk_scan
from kernels.machine import DEVICE
from kernels.selective_scan import selective_scan, selective_state_update

BASELINES = {  # package -> its module
    "mambapy": "mambapy",
    "transformers": "transformers",
    "mamba-ssm": "mamba_ssm",
    "flash-linear-attention": "fla",
}
GPU_ONLY = ("mamba-ssm", "flash-linear-attention")

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


def _measured(implementations: dict[str, Run]) -> dict[str, Run]:
    """Leave out the baselines that are not measured on this machine."""
    packages = {name: name.split(",")[0] for name in implementations}
    return {
        name: run
        for name, run in implementations.items()
        if packages[name] not in BASELINES or why_not_measured(packages[name]) is None
    }


@functools.cache
def _imported(module: str, name: str) -> Callable:
    """Import a function of a baseline in the process that measures it: a failing import stops no other baseline."""
    return getattr(importlib.import_module(module), name)


@functools.cache
def _transformers(model: str, name: str) -> Callable:
    """Import transformers' path in torch operators; the function itself may be replaced by that of mamba-ssm."""
    return inspect.unwrap(_imported(f"transformers.models.{model}.modeling_{model}", name))


def _normal_generator() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator).to(DEVICE)


# ------------------------------------------------------------------------------------------------------ selective scan


def selective_scan_case(size: Size) -> BenchmarkCase:
    """Mamba's layer, at the size at which mambapy reports its times."""
    size = {"batch": 2, "D": 1024, "N": 16, "L": 2048} | size
    batch, D, N, L = size.values()

    def make_arguments() -> Tensors:
        normal = _normal_generator()
        return dict(
            u=normal(batch, D, L),
            delta=normal(batch, D, L).abs() * 0.1,
            A=-normal(D, N).abs(),
            B=normal(batch, N, L),
            C=normal(batch, N, L),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: selective_scan(**a),
        "ours, torch operators": lambda a: selective_scan(**a, impl="chunked"),
        "mambapy": _mambapy,
        "transformers": lambda a: _transformers("mamba", "mamba_selective_scan")(*a.values()),
        "mamba-ssm": lambda a: _imported(MAMBA_SCAN, "selective_scan_fn")(**a),
        "mamba-ssm, reference": lambda a: _imported(MAMBA_SCAN, "selective_scan_ref")(**a),
    }
    return BenchmarkCase(
        size=size,
        check_size=size | {"L": min(L, 2048)},
        scaling=("L", (512, 1024, 2048, 4096, 8192)),
        cost=_scan_cost(batch, D, 1, N, L, False),
        make_arguments=make_arguments,
        implementations=_measured(implementations),
        reference=implementations["ours, torch operators"],
        size_limits={"transformers": {"L": 128}},  # each step's backward pass fills a gradient as large as all steps
    )


MAMBA_SCAN = "mamba_ssm.ops.selective_scan_interface"


def _mambapy(a: Tensors) -> Tensor:
    """Run mambapy's `selective_scan`: the coefficients of every step, then its parallel scan."""
    delta = a["delta"].mT
    decay = torch.exp(delta[..., None] * a["A"])
    drive = delta[..., None] * a["B"].mT[:, :, None] * a["u"].mT[..., None]
    return (_imported("mambapy.pscan", "pscan")(decay, drive) @ a["C"].mT[..., None]).squeeze(3).mT


def hedgemamba_case(size: Size) -> BenchmarkCase:
    """A layer of Pythia-1B as HedgeMamba, all heads in one call.

    B and C are features (positive, adding up to 1), and each head has its own. No baseline divides by the same scan of
    ones. The reference takes minutes, so results are compared on a part.
    """
    size = {"batch": 1, "heads": 8, "P": 256, "N": 512, "L": 1024} | size
    batch, heads, P, N, L = size.values()

    def make_arguments() -> Tensors:
        normal = _normal_generator()
        return dict(
            u=normal(batch, heads * P, L),
            delta=torch.nn.functional.softplus(normal(batch, heads * P, L)),
            A=-0.01 * normal(heads * P, 1).abs() * torch.arange(1, N + 1, device=DEVICE),
            B=normal(batch, heads, N, L).softmax(2),
            C=normal(batch, heads, N, L).softmax(2),
        )

    return BenchmarkCase(
        size=size,
        check_size=size | {"heads": 1, "L": min(L, 160)},
        scaling=("L", (256, 512, 1024, 2048)),
        cost=_scan_cost(batch, heads * P, heads, N, L, True),
        make_arguments=make_arguments,
        implementations={"ours": lambda a: selective_scan(**a, normalize=True)},
        reference=lambda a: selective_scan(**a, normalize=True, impl="chunked"),
    )


def _scan_cost(batch: int, D: int, groups: int, N: int, L: int, normalize: bool) -> dict[str, Cost]:
    """Cost of a selective scan.

    Backward reads u, delta, dy, B and C, writes du, ddelta, dB and dC, and computes the decays again, because keeping
    them would take N times as many bytes.
    """
    wide, shared, states = batch * L * D, batch * L * groups * N, batch * L * D * N
    forward, backward = (11, 33) if normalize else (6, 19)  # operations per state and step, beside the exponential
    return {
        "forward": Cost(4 * (3 * wide + 2 * shared), forward * states, states),
        "backward": Cost(4 * (5 * wide + 4 * shared), backward * states, states),
    }


# ---------------------------------------------------------------------------------------------------------- chunk scan


def chunk_scan_case(size: Size) -> BenchmarkCase:
    """Mamba-2's scan, where each head has its own B and C."""
    size = {"batch": 1, "H": 16, "P": 64, "N": 128, "L": 4096} | size
    batch, H, P, N, L = size.values()

    def make_arguments() -> Tensors:
        normal = _normal_generator()
        return dict(
            x=normal(batch, L, H, P),
            dt=normal(batch, L, H).abs(),
            A=-normal(H).abs() * 0.1,
            B=normal(batch, L, H, N),
            C=normal(batch, L, H, N),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: chunk_scan(**a),
        "ours, torch operators": lambda a: chunk_scan(**a, impl="chunked"),
        "transformers": lambda a: _transformers("mamba2", "mamba2_chunk_scan")(*a.values(), chunk_size=64),
        "mamba-ssm": lambda a: _imported(MAMBA2_SCAN, "mamba_chunk_scan_combined")(**a, chunk_size=64),
        "flash-linear-attention": _flash_linear_attention,
    }
    Q, steps = 64, batch * L * H  # the products of chunks of Q steps: kernels/chunk_scan/README.md
    forward = int(2 * (Q * N / 2 + Q * P / 2 + 2 * N * P)) * steps
    return BenchmarkCase(
        size=size,
        check_size=size | {"L": min(L, 4096)},
        scaling=("L", (512, 1024, 2048, 4096, 8192)),
        cost={
            "forward": Cost(4 * (2 * P + 2 * N + 1) * steps, forward, steps),
            "backward": Cost(4 * (3 * P + 4 * N + 2) * steps, int(2.5 * forward), steps),
        },
        make_arguments=make_arguments,
        implementations=_measured(implementations),
        reference=implementations["ours, torch operators"],
    )


MAMBA2_SCAN = "mamba_ssm.ops.triton.ssd_combined"


def _flash_linear_attention(a: Tensors) -> Tensor:
    """Gated linear attention with one decay per head: C are the queries, B the keys, and dt x the values."""
    attention = _imported("fla.ops.simple_gla", "chunk_simple_gla")
    return attention(a["C"], a["B"], a["x"] * a["dt"][..., None], g=a["dt"] * a["A"], scale=1.0)[0]


# ------------------------------------------------------------------------------------------------- one decoding step


def state_update_case(size: Size) -> BenchmarkCase:
    """One decoding step of a Mamba-1 layer, with D, gate and softplus; the new state is compared too."""
    size = {"batch": 1, "D": 2048, "N": 16} | size
    batch, D, N = size.values()

    def make_arguments() -> Tensors:
        normal = _normal_generator()
        return dict(
            state=normal(batch, D, N),
            x=normal(batch, D),
            dt=normal(batch, D),
            A=-normal(D, N).abs(),
            B=normal(batch, N),
            C=normal(batch, N),
            D=normal(D),
            z=normal(batch, D),
            dt_bias=normal(D),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: _step(selective_state_update, a),
        "torch operators": lambda a: _step(functools.partial(selective_state_update, impl="reference"), a),
        "transformers": lambda a: _step(_transformers("mamba", "mamba_selective_state_update"), a),
        "mamba-ssm": lambda a: _step(_imported(MAMBA_STEP, "selective_state_update"), a),
    }
    states = batch * D * N
    return BenchmarkCase(
        size=size,
        check_size=size,
        scaling=("batch", (1, 4, 16, 64)),
        cost={"forward": Cost(4 * (2 * states + D * N), 6 * states, states)},  # the state, read and written, and A
        make_arguments=make_arguments,
        implementations=_measured(implementations),
        reference=implementations["torch operators"],
    )


MAMBA_STEP = "mamba_ssm.ops.triton.selective_state_update"


def _step(update: Callable, a: Tensors) -> tuple[Tensor, Tensor]:
    *first, z, dt_bias = a.values()
    return update(*first, z=z, dt_bias=dt_bias, dt_softplus=True), a["state"]


CASES: dict[str, Callable[[Size], BenchmarkCase]] = {
    "selective_scan": selective_scan_case,
    "hedgemamba": hedgemamba_case,
    "chunk_scan": chunk_scan_case,
    "selective_state_update": state_update_case,
}
