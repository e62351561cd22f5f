"""The chunk scan beside its baselines."""

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
from kernels.chunk_scan import chunk_scan


def chunk_scan_case(size: Size) -> BenchmarkCase:
    """Mamba-2's scan, where each head has its own B and C; in Mamba-2 itself all heads share them (G=1)."""
    size = {"batch": 1, "H": 16, "P": 64, "N": 128, "G": size.get("H", 16), "L": 4096} | size
    batch, H, P, N, G, L = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
        return dict(
            x=normal(batch, L, H, P),
            dt=normal(batch, L, H).abs(),
            A=-normal(H).abs() * 0.1,
            B=normal(batch, L, G, N),
            C=normal(batch, L, G, N),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: chunk_scan(**a, impl=OURS),
        "ours, torch operators": lambda a: chunk_scan(**a, impl="chunked"),
        "transformers": lambda a: from_transformers("mamba2", "mamba2_chunk_scan")(*a.values(), chunk_size=64),
        "mamba-ssm": lambda a: imported(MAMBA2_SCAN, "mamba_chunk_scan_combined")(**a, chunk_size=64),
        BY_IMPL: lambda a: chunk_scan(**a, impl="mamba_ssm"),
        "flash-linear-attention": _flash_linear_attention,
    }
    Q, steps = 64, batch * L * H  # the products of chunks of Q steps: kernels/chunk_scan/README.md
    forward = int(2 * (Q * N / 2 + Q * P / 2 + 2 * N * P)) * steps
    return BenchmarkCase(
        size=size,
        check_size=size | {"L": min(L, 4096)},
        scaling=("L", (512, 1024, 2048, 4096, 8192)),
        cost={
            "forward": Cost(4 * ((2 * P + 1) * steps + 2 * N * steps * G // H), forward, steps),
            "backward": Cost(4 * ((3 * P + 2) * steps + 4 * N * steps * G // H), int(2.5 * forward), steps),
        },
        make_arguments=make_arguments,
        implementations=measured(implementations),
        reference=implementations["ours, torch operators"],
    )


MAMBA2_SCAN = "mamba_ssm.ops.triton.ssd_combined"


def _flash_linear_attention(a: Tensors) -> Tensor:
    """Gated linear attention with one decay per head: C are the queries, B the keys, and dt x the values."""
    attention, H = imported("fla.ops.simple_gla", "chunk_simple_gla"), a["x"].shape[2]
    C, B = (t if t.shape[2] == H else t.repeat_interleave(H // t.shape[2], 2) for t in (a["C"], a["B"]))
    return attention(C, B, a["x"] * a["dt"][..., None], g=a["dt"] * a["A"], scale=1.0)[0]
