"""What `kernels.bench` measures: per operator the sizes, the work in bytes and operations, ours and every peer installed."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.chunk_scan import chunk_scan
from kernels.selective_scan import selective_scan, selective_state_update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Work:
    size: dict
    scaling: list[dict]
    bytes: int  # that must move: inputs, outputs and their gradients once
    operations: int  # multiplications and additions of forward and backward
    make: Callable[[torch.dtype], dict[str, Tensor]]
    contenders: dict[str, Callable[[dict], Tensor]]  # the first is ours
    exact: Callable[[dict], Tensor]
    backward: bool = True

    def both(self, run, arguments: dict) -> list[Tensor]:
        """The output and, where there are any, all gradients."""
        if not self.backward:
            with torch.no_grad():
                return [run({k: v.clone() for k, v in arguments.items()})]
        leaves = {k: v.detach().requires_grad_() for k, v in arguments.items()}
        y = run(leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]


def _has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _normal(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)


def selective_scan_work(size: dict) -> Work:
    """batch, D channels, N states, L: Mamba's layer at the size that mambapy was measured at."""
    size = {"batch": 2, "D": 1024, "N": 16, "L": 2048} | size
    batch, D, N, L = size.values()

    def make(dtype):
        normal = _normal()
        a = dict(
            u=normal(batch, D, L),
            delta=normal(batch, D, L).abs() * 0.1,
            A=-normal(D, N).abs(),
            B=normal(batch, N, L),
            C=normal(batch, N, L),
        )
        return {k: v.to(DEVICE, dtype) for k, v in a.items()}

    contenders = {"ours": lambda a: selective_scan(**a), "ours, torch operators": lambda a: selective_scan(**a, impl="chunked")}
    if _has("mambapy"):
        contenders["mambapy"] = _mambapy
    if _has("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

        contenders |= {"mamba-ssm": lambda a: selective_scan_fn(**a), "mamba-ssm reference": lambda a: selective_scan_ref(**a)}
    elements = batch * D * L
    return Work(
        size, [size | {"L": length} for length in (512, 1024, 2048, 4096, 8192)], 4 * (3 + 5) * elements, (6 + 17) * elements * N, make,
        contenders, lambda a: selective_scan(**a, impl="chunked"),
    )  # fmt: skip


def _mambapy(a: dict) -> Tensor:
    """Its `selective_scan`: coefficients of every step, then the parallel scan."""
    from mambapy.pscan import pscan

    delta = a["delta"].mT
    decay = torch.exp(delta[..., None] * a["A"])
    drive = delta[..., None] * a["B"].mT[:, :, None] * a["u"].mT[..., None]
    return (pscan(decay, drive) @ a["C"].mT[..., None]).squeeze(3).mT


def chunk_scan_work(size: dict) -> Work:
    """batch, heads, P channels of a head, N states, L."""
    size = {"batch": 1, "H": 16, "P": 64, "N": 128, "L": 4096} | size
    batch, H, P, N, L = size.values()

    def make(dtype):
        normal = _normal()
        a = dict(
            x=normal(batch, L, H, P),
            dt=normal(batch, L, H).abs(),
            A=-normal(H).abs() * 0.1,
            B=normal(batch, L, H, N),
            C=normal(batch, L, H, N),
        )
        return {k: v.to(DEVICE, dtype) for k, v in a.items()}

    contenders = {"ours": lambda a: chunk_scan(**a), "ours, torch operators": lambda a: chunk_scan(**a, impl="chunked")}
    if _has("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        contenders["mamba-ssm"] = lambda a: mamba_chunk_scan_combined(**a, chunk_size=64)
    Q, steps = 64, batch * L * H
    return Work(
        size, [size | {"L": length} for length in (512, 1024, 2048, 4096, 8192)], 4 * (3 * 2 * N + 3 * 2 * P) * steps,
        int(3.5 * 2 * (Q * N / 2 + Q * P / 2 + 2 * N * P)) * steps, make, contenders, lambda a: chunk_scan(**a, impl="chunked"),
    )  # fmt: skip


def state_update_work(size: dict) -> Work:
    """One decoding step of a Mamba-1 layer: batch, D channels, N states."""
    size = {"batch": 1, "D": 2048, "N": 16} | size
    batch, D, N = size.values()

    def make(dtype):
        normal = _normal()
        a = dict(
            state=normal(batch, D, N), x=normal(batch, D), dt=normal(batch, D), A=-normal(D, N).abs(), B=normal(batch, N), C=normal(batch, N),
            D=normal(D), z=normal(batch, D), dt_bias=normal(D),
        )  # fmt: skip
        return {k: v.to(DEVICE, dtype) for k, v in a.items()}

    step = lambda impl: lambda a: selective_state_update(**a, dt_softplus=True, impl=impl)  # noqa: E731
    contenders = {"ours": step("auto"), "torch operators": step("reference")}
    if _has("mamba_ssm"):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update as theirs

        contenders["mamba-ssm"] = lambda a: theirs(**a, dt_softplus=True)
    elements = batch * D * N
    return Work(
        size,
        [size | {"batch": b} for b in (1, 4, 16, 64)],
        4 * 3 * elements,
        6 * elements,
        make,
        contenders,
        step("reference"),
        backward=False,
    )


OPERATORS = {"selective_scan": selective_scan_work, "chunk_scan": chunk_scan_work, "selective_state_update": state_update_work}
