"""Launches that `kernels.audit` compiles: our operators, and those of baselines, each at the sizes that matter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AuditCase:
    """A function that launches an operator's kernels on empty tensors, forward and backward, and its arguments."""

    launch: Callable[..., None]
    sizes: dict[str, int | bool]
    baseline: str = ""  # the module of a baseline's kernels; ours have none

    def __str__(self) -> str:
        words = (k if v is True else f"{k}={v}" for k, v in self.sizes.items())
        return f"{self.launch.__name__} {' '.join(words)}"


def selective_scan(
    N: int,
    batch: int = 2,
    D: int = 2048,
    L: int = 2048,
    G: int = 1,
    R: int = 1,
    ones: bool = False,
    documents: bool = False,
    training: bool = True,
) -> None:
    from kernels.selective_scan.fused import selective_scan_triton

    u, delta, A, B, C = _floats(training, (batch, D, L), (batch, D, L), (D, N), (batch, G, N, L), (batch, G * R, N, L))
    (h,) = _floats(training, (1 + ones, batch, D, N))
    starts = torch.empty(batch, L, dtype=torch.bool) if documents else None
    outputs, last = selective_scan_triton(u, delta, A, B, C, h, starts)
    _backward(*outputs, last)


def chunk_scan(
    N: int,
    batch: int = 2,
    H: int = 32,
    P: int = 64,
    L: int = 2048,
    G: int = 32,
    R: int = 1,
    ones: bool = False,
    documents: bool = False,
    bf16: bool = False,
    training: bool = True,
) -> None:
    from kernels.chunk_scan.fused import chunk_scan_triton

    dtype = torch.bfloat16 if bf16 else torch.float32
    rows_of_C = (G if R == 1 else H), R
    x, B, C = _floats(training, (batch, L, H, P + ones), (batch, L, G, N), (batch, L, *rows_of_C, N), dtype=dtype)
    log_decay, S = _floats(training, (batch, L, H), (batch, H, N, P + ones))
    ids = torch.empty(batch, L, dtype=torch.int64) if documents else None
    _backward(*chunk_scan_triton(x, log_decay, B, C, S, ids))


def ss2d(N: int, batch: int = 16, D: int = 192, H: int = 28, W: int = 28, training: bool = True) -> None:
    from kernels.ss2d.fused import ss2d_triton

    x, delta, A = _floats(training, (batch, D, H, W), (batch, 4, D, H, W), (4, D, N))
    B, C = _floats(training, *[(batch, 4, N, H, W)] * 2)
    _backward(ss2d_triton(x, delta, A, B, C))


def ss2d_lowrank(
    r: int, batch: int = 16, D: int = 192, N: int = 64, H: int = 28, W: int = 28, delta: bool = False,
    training: bool = True,
) -> None:  # fmt: skip
    from kernels.ss2d.fused import ss2d_lowrank_triton

    x, U, sigma, V = _floats(training, (batch, D, H, W), (4, N, r), (4, r), (4, N, r))
    B, C, steps = _floats(training, *[(batch, 4, N, H, W)] * 2, (batch, 4, D, H, W))
    _backward(ss2d_lowrank_triton(x, steps if delta else None, U, sigma, V, B, C))


def selective_state_update(
    N: int, batch: int = 16, heads: int = 1, P: int = 4096, G: int = 1, bf16: bool = False
) -> None:
    from kernels.selective_scan.fused import update_triton

    dtype = torch.bfloat16 if bf16 else torch.float32
    state, A, D, dt_bias = _floats(False, (batch, heads, P, N), (heads, P, N), (heads, P), (heads, P))
    x, dt, z, B, C = _floats(False, *[(batch, heads, P)] * 3, *[(batch, G, N)] * 2, dtype=dtype)
    update_triton(state, x, dt, A, B, C, D, z, dt_bias, True)


def mamba_ssm(N: int, batch: int = 2, H: int = 32, P: int = 64, L: int = 2048, training: bool = False) -> None:
    """Launch mamba-ssm's chunk scan, forward only: its backward pass asks the GPU how large it is."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, B, C = _floats(training, (batch, L, H, P), (batch, L, 1, N), (batch, L, 1, N), dtype=torch.bfloat16)
    dt, A = _floats(training, (batch, L, H), (H,))
    _backward(mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=64))


def simple_gla(N: int, batch: int = 2, H: int = 32, P: int = 64, L: int = 2048) -> None:
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = _floats(True, (batch, L, H, N), (batch, L, H, N), (batch, L, H, P), dtype=torch.bfloat16)
    (g,) = _floats(True, (batch, L, H))
    _backward(chunk_simple_gla(q, k, v, g=g, scale=1.0)[0])


def _floats(training: bool, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, requires_grad=training) for shape in shapes]


def _backward(*outputs: Tensor) -> None:
    if outputs[0].requires_grad:
        sum(t.sum() for t in outputs).backward()


CASES = [
    AuditCase(selective_scan, dict(N=16)),
    AuditCase(selective_scan, dict(N=16, training=False)),
    AuditCase(selective_scan, dict(N=16, batch=1)),
    AuditCase(selective_scan, dict(N=100, G=4, R=2)),
    AuditCase(selective_scan, dict(N=16, ones=True, documents=True)),
    AuditCase(selective_scan, dict(N=512, G=4, ones=True)),
    AuditCase(selective_scan, dict(N=512, G=4, R=2, ones=True, documents=True)),
    AuditCase(chunk_scan, dict(N=16)),
    AuditCase(chunk_scan, dict(N=16, batch=1)),
    AuditCase(chunk_scan, dict(N=128)),
    AuditCase(chunk_scan, dict(N=128, bf16=True)),
    AuditCase(chunk_scan, dict(N=128, G=1)),
    AuditCase(chunk_scan, dict(N=128, G=1, bf16=True)),
    AuditCase(chunk_scan, dict(N=100, R=2, ones=True, documents=True)),
    AuditCase(chunk_scan, dict(N=512, G=4, R=2, ones=True, documents=True, bf16=True)),
    AuditCase(ss2d, dict(N=16)),
    AuditCase(ss2d, dict(N=16, training=False)),
    AuditCase(ss2d, dict(N=1, batch=1)),
    AuditCase(ss2d, dict(N=16, batch=128)),
    AuditCase(ss2d, dict(N=100)),
    AuditCase(ss2d_lowrank, dict(r=8)),
    AuditCase(ss2d_lowrank, dict(r=16, batch=1, training=False)),
    AuditCase(ss2d_lowrank, dict(r=16, batch=512, delta=True)),
    AuditCase(ss2d_lowrank, dict(r=32, delta=True)),
    AuditCase(mamba_ssm, dict(N=128, training=False), "mamba_ssm.ops.triton.ssd_combined"),
    AuditCase(simple_gla, dict(N=128), "fla.ops.simple_gla"),
    AuditCase(selective_state_update, dict(N=16)),
    AuditCase(selective_state_update, dict(N=100, heads=32, P=64, G=8, bf16=True)),
    AuditCase(selective_state_update, dict(N=512)),
]
