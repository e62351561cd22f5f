"""What `kernels.bench` measures: for each case its size, the least work it takes, ours and every peer, and the exact result."""

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

PEERS = {"mambapy": "mambapy", "transformers": "transformers", "mamba-ssm": "mamba_ssm", "flash-linear-attention": "fla"}  # package: module
ON_A_GPU = ("mamba-ssm", "flash-linear-attention")

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cost:
    """The least that the definition needs: bytes of inputs and results, once; multiplications and additions; exponentials."""

    bytes: int
    operations: int
    exponentials: int


@dataclass(frozen=True)
class Work:
    size: dict[str, int]
    check: dict[str, int]  # the size at which results are compared with float64
    grows: tuple[str, tuple[int, ...]]  # of the scaling table: which part of the size, and its values
    cost: dict[str, Cost]  # of "forward" and, where there are gradients, "backward"
    make: Callable[[], Tensors]  # float32
    contenders: dict[str, Run]  # the first is ours; a name begins with its package
    exact: Run
    smaller: dict[str, dict[str, int]] = field(default_factory=dict)  # contender -> the most of a size that it can take

    @property
    def gradients(self) -> bool:
        return "backward" in self.cost

    def results(self, run: Run, arguments: Tensors) -> list[Tensor]:
        """What it returns, and all gradients where there are any."""
        if not self.gradients:
            with torch.no_grad():
                return [*run(arguments)]
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        y = run(leaves)
        return [y.detach(), *torch.autograd.grad(y, [*leaves.values()], gradient_of(y))]


def gradient_of(y: Tensor) -> Tensor:
    """The same for every contender and dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def why_not(peer: str) -> str | None:
    """Why a peer is not measured here; None if it is."""
    if importlib.util.find_spec(PEERS[peer]) is None:
        return "not installed"
    return "needs a GPU" if peer in ON_A_GPU and DEVICE == "cpu" else None


def _here(contenders: dict[str, Run]) -> dict[str, Run]:
    """Without the peers that are not."""
    peers = {name: name.split(",")[0] for name in contenders}
    return {name: run for name, run in contenders.items() if peers[name] not in PEERS or why_not(peers[name]) is None}


@functools.cache
def _from(module: str, name: str):
    """A function of a peer. Imported by the process that measures it: one that cannot be imported stops no other."""
    return getattr(importlib.import_module(module), name)


@functools.cache
def _transformers(model: str, name: str):
    """Its path in torch operators; the function itself may be replaced by mamba-ssm's."""
    return inspect.unwrap(_from(f"transformers.models.{model}.modeling_{model}", name))


def _normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator).to(DEVICE)


# ------------------------------------------------------------------------------------------------------------ selective scan


def selective_scan_work(size: dict[str, int]) -> Work:
    """Mamba's layer at the size that mambapy is measured at."""
    size = {"batch": 2, "D": 1024, "N": 16, "L": 2048} | size
    batch, D, N, L = size.values()

    def make():
        normal = _normal()
        return dict(
            u=normal(batch, D, L),
            delta=normal(batch, D, L).abs() * 0.1,
            A=-normal(D, N).abs(),
            B=normal(batch, N, L),
            C=normal(batch, N, L),
        )

    contenders = {
        "ours": lambda a: selective_scan(**a),
        "ours, torch operators": lambda a: selective_scan(**a, impl="chunked"),
        "mambapy": _mambapy,
        "transformers": lambda a: _transformers("mamba", "mamba_selective_scan")(*a.values()),
        "mamba-ssm": lambda a: _from(MAMBA_SCAN, "selective_scan_fn")(**a),
        "mamba-ssm, reference": lambda a: _from(MAMBA_SCAN, "selective_scan_ref")(**a),
    }
    check, grows = size | {"L": min(L, 2048)}, ("L", (512, 1024, 2048, 4096, 8192))
    smaller = {"transformers": {"L": 128}}  # each step's backward pass fills a gradient as large as all steps
    cost, exact = _scan_cost(batch, D, 1, N, L, False), contenders["ours, torch operators"]
    return Work(size, check, grows, cost, make, _here(contenders), exact, smaller)


MAMBA_SCAN = "mamba_ssm.ops.selective_scan_interface"


def _mambapy(a: Tensors) -> Tensor:
    """Its `selective_scan`: coefficients of every step, then the parallel scan."""
    delta = a["delta"].mT
    decay = torch.exp(delta[..., None] * a["A"])
    drive = delta[..., None] * a["B"].mT[:, :, None] * a["u"].mT[..., None]
    return (_from("mambapy.pscan", "pscan")(decay, drive) @ a["C"].mT[..., None]).squeeze(3).mT


def hedgemamba_work(size: dict[str, int]) -> Work:
    """A layer of Pythia-1B as HedgeMamba, all heads in one call: B and C are features (positive, adding up to 1), each head has its own.
    No peer divides by the same scan of ones; torch operators take minutes, so they only check it, on a part."""
    size = {"batch": 1, "heads": 8, "P": 256, "N": 512, "L": 1024} | size
    batch, heads, P, N, L = size.values()

    def make():
        normal = _normal()
        return dict(
            u=normal(batch, heads * P, L),
            delta=torch.nn.functional.softplus(normal(batch, heads * P, L)),
            A=-0.01 * normal(heads * P, 1).abs() * torch.arange(1, N + 1, device=DEVICE),
            B=normal(batch, heads, N, L).softmax(2),
            C=normal(batch, heads, N, L).softmax(2),
        )

    def torch_operators(a):
        return selective_scan(**a, normalize=True, impl="chunked")

    check, grows = size | {"heads": 1, "L": min(L, 160)}, ("L", (256, 512, 1024, 2048))
    cost = _scan_cost(batch, heads * P, heads, N, L, True)
    return Work(size, check, grows, cost, make, {"ours": lambda a: selective_scan(**a, normalize=True)}, torch_operators)


def _scan_cost(batch: int, D: int, groups: int, N: int, L: int, normalize: bool) -> dict[str, Cost]:
    """Backward: u, delta, dy, B, C read, du, ddelta, dB, dC written; the decays again, which would be N times as many bytes to keep."""
    wide, shared, states = batch * L * D, batch * L * groups * N, batch * L * D * N
    forward, backward = (11, 33) if normalize else (6, 19)  # operations of a state and step, beside the exponential
    return {
        "forward": Cost(4 * (3 * wide + 2 * shared), forward * states, states),
        "backward": Cost(4 * (5 * wide + 4 * shared), backward * states, states),
    }


# ---------------------------------------------------------------------------------------------------------------- chunk scan


def chunk_scan_work(size: dict[str, int]) -> Work:
    """Mamba-2's scan; each head has its own B and C."""
    size = {"batch": 1, "H": 16, "P": 64, "N": 128, "L": 4096} | size
    batch, H, P, N, L = size.values()

    def make():
        normal = _normal()
        return dict(
            x=normal(batch, L, H, P),
            dt=normal(batch, L, H).abs(),
            A=-normal(H).abs() * 0.1,
            B=normal(batch, L, H, N),
            C=normal(batch, L, H, N),
        )

    contenders = {
        "ours": lambda a: chunk_scan(**a),
        "ours, torch operators": lambda a: chunk_scan(**a, impl="chunked"),
        "transformers": lambda a: _transformers("mamba2", "mamba2_chunk_scan")(*a.values(), chunk_size=64),
        "mamba-ssm": lambda a: _from("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")(**a, chunk_size=64),
        "flash-linear-attention": _flash_linear_attention,
    }
    Q, steps = 64, batch * L * H  # in chunks of Q: kernels/chunk_scan/README.md
    forward = int(2 * (Q * N / 2 + Q * P / 2 + 2 * N * P)) * steps
    cost = {
        "forward": Cost(4 * (2 * P + 2 * N + 1) * steps, forward, steps),
        "backward": Cost(4 * (3 * P + 4 * N + 2) * steps, int(2.5 * forward), steps),
    }
    check, grows = size | {"L": min(L, 4096)}, ("L", (512, 1024, 2048, 4096, 8192))
    return Work(size, check, grows, cost, make, _here(contenders), contenders["ours, torch operators"])


def _flash_linear_attention(a: Tensors) -> Tensor:
    """Its gated linear attention with one decay per head: C are queries, B keys, dt x values."""
    attention = _from("fla.ops.simple_gla", "chunk_simple_gla")
    return attention(a["C"], a["B"], a["x"] * a["dt"][..., None], g=a["dt"] * a["A"], scale=1.0)[0]


# -------------------------------------------------------------------------------------------------------------- one decode step


def state_update_work(size: dict[str, int]) -> Work:
    """One decoding step of a Mamba-1 layer, with D, gate and softplus; the new state is compared too."""
    size = {"batch": 1, "D": 2048, "N": 16} | size
    batch, D, N = size.values()

    def make():
        normal = _normal()
        return dict(
            state=normal(batch, D, N), x=normal(batch, D), dt=normal(batch, D), A=-normal(D, N).abs(), B=normal(batch, N), C=normal(batch, N),
            D=normal(D), z=normal(batch, D), dt_bias=normal(D),
        )  # fmt: skip

    contenders = {
        "ours": lambda a: _step(selective_state_update, a),
        "torch operators": lambda a: _step(functools.partial(selective_state_update, impl="reference"), a),
        "transformers": lambda a: _step(_transformers("mamba", "mamba_selective_state_update"), a),
        "mamba-ssm": lambda a: _step(_from("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"), a),
    }
    states = batch * D * N
    cost = {"forward": Cost(4 * (2 * states + D * N), 6 * states, states)}  # the state read and written, and A
    return Work(size, size, ("batch", (1, 4, 16, 64)), cost, make, _here(contenders), contenders["torch operators"])


def _step(update, a: Tensors) -> tuple[Tensor, Tensor]:
    *first, z, dt_bias = a.values()
    return update(*first, z=z, dt_bias=dt_bias, dt_softplus=True), a["state"]


CASES = {
    "selective_scan": selective_scan_work,
    "hedgemamba": hedgemamba_work,
    "chunk_scan": chunk_scan_work,
    "selective_state_update": state_update_work,
}
