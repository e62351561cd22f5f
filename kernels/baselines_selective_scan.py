"""The selective scan beside its baselines: a layer, a layer as HedgeMamba, and one decoding step."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bench_case import (
    BY_IMPL,
    OURS,
    BenchmarkCase,
    Cost,
    Run,
    Size,
    Tensors,
    from_transformers,
    imported,
    measured,
    normal_generator,
)
from kernels.machine import DEVICE
from kernels.selective_scan import selective_scan, selective_state_update


def selective_scan_case(size: Size) -> BenchmarkCase:
    """Mamba's layer, at the size at which mambapy reports its times."""
    size = {"batch": 2, "D": 1024, "N": 16, "L": 2048} | size
    batch, D, N, L = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
        return dict(
            u=normal(batch, D, L),
            delta=normal(batch, D, L).abs() * 0.1,
            A=-normal(D, N).abs(),
            B=normal(batch, N, L),
            C=normal(batch, N, L),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: selective_scan(**a, impl=OURS),
        "ours, torch operators": lambda a: selective_scan(**a, impl="chunked"),
        "mambapy": _mambapy,
        "transformers": lambda a: from_transformers("mamba", "mamba_selective_scan")(*a.values()),
        "mamba-ssm": lambda a: imported(MAMBA_SCAN, "selective_scan_fn")(**a),
        BY_IMPL: lambda a: selective_scan(**a, impl="mamba_ssm"),
        "mamba-ssm, reference": lambda a: imported(MAMBA_SCAN, "selective_scan_ref")(**a),
    }
    return BenchmarkCase(
        size=size,
        check_size=size | {"L": min(L, 2048)},
        scaling=("L", (512, 1024, 2048, 4096, 8192)),
        cost=_scan_cost(batch, D, 1, N, L, False),
        make_arguments=make_arguments,
        implementations=measured(implementations),
        reference=implementations["ours, torch operators"],
        size_limits={"transformers": {"L": 128}},  # each step's backward pass fills a gradient as large as all steps
    )


MAMBA_SCAN = "mamba_ssm.ops.selective_scan_interface"


def _mambapy(a: Tensors) -> Tensor:
    """Run mambapy's `selective_scan`: the coefficients of every step, then its parallel scan."""
    delta = a["delta"].mT
    decay = torch.exp(delta[..., None] * a["A"])
    drive = delta[..., None] * a["B"].mT[:, :, None] * a["u"].mT[..., None]
    return (imported("mambapy.pscan", "pscan")(decay, drive) @ a["C"].mT[..., None]).squeeze(3).mT


def hedgemamba_case(size: Size) -> BenchmarkCase:
    """A layer of Pythia-1B as HedgeMamba, all heads in one call.

    B and C are features (positive, adding up to 1), and each head has its own. No baseline divides by the same scan of
    ones. The reference takes minutes, so results are compared on a part.
    """
    size = {"batch": 1, "heads": 8, "P": 256, "N": 512, "L": 1024} | size
    batch, heads, P, N, L = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
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


# ------------------------------------------------------------------------------------------------- one decoding step


def state_update_case(size: Size) -> BenchmarkCase:
    """One decoding step of a Mamba-1 layer, with D, gate and softplus; the new state is compared too."""
    size = {"batch": 1, "D": 2048, "N": 16} | size
    batch, D, N = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
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
        "ours": lambda a: _step(functools.partial(selective_state_update, impl=OURS), a),
        "torch operators": lambda a: _step(functools.partial(selective_state_update, impl="reference"), a),
        "transformers": lambda a: _step(from_transformers("mamba", "mamba_selective_state_update"), a),
        "mamba-ssm": lambda a: _step(imported(MAMBA_STEP, "selective_state_update"), a),
        BY_IMPL: lambda a: _step(functools.partial(selective_state_update, impl="mamba_ssm"), a),
    }
    states = batch * D * N
    return BenchmarkCase(
        size=size,
        check_size=size,
        scaling=("batch", (1, 4, 16, 64)),
        cost={"forward": Cost(4 * (2 * states + D * N), 6 * states, states)},  # the state, read and written, and A
        make_arguments=make_arguments,
        implementations=measured(implementations),
        reference=implementations["torch operators"],
    )


MAMBA_STEP = "mamba_ssm.ops.triton.selective_state_update"


def _step(update: Callable, a: Tensors) -> tuple[Tensor, Tensor]:
    *first, z, dt_bias = a.values()
    return update(*first, z=z, dt_bias=dt_bias, dt_softplus=True), a["state"]
