"""Both delta rules beside their baselines."""

from collections.abc import Callable

import torch

from kernels.bench_case import (
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
from kernels.delta_rule import gated_delta_rule, kda, operations


def kda_case(size: Size) -> BenchmarkCase:
    """Kimi Delta Attention's rule, with a decay per channel."""
    return _case(size, kda, "chunk_kda", ("kimi_linear", "chunk_kimi_delta_attention"), per_channel=True)


def gated_delta_rule_case(size: Size) -> BenchmarkCase:
    """Gated DeltaNet's rule, with a decay per head."""
    theirs = "qwen3_5", "torch_chunk_gated_delta_rule"
    return _case(size, gated_delta_rule, "chunk_gated_delta_rule", theirs, per_channel=False)


def _case(size: Size, rule: Callable, fla: str, transformers: tuple[str, str], per_channel: bool) -> BenchmarkCase:
    size = {"batch": 1, "H": 8, "K": 64, "V": 64, "T": 2048} | size
    batch, H, K, V, T = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
        return dict(
            q=normal(batch, T, H, K),
            k=torch.nn.functional.normalize(normal(batch, T, H, K), dim=-1),
            v=normal(batch, T, H, V),
            g=-0.1 * normal(batch, T, H, *((K,) if per_channel else ())).abs(),
            beta=normal(batch, T, H).sigmoid(),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: rule(**a)[0],
        "ours, torch operators": lambda a: rule(**a, impl="chunked")[0],
        "transformers": lambda a: from_transformers(*transformers)(*a.values())[0],
        "flash-linear-attention": lambda a: imported(f"fla.ops.{rule.__name__}", fla)(**a)[0],
    }
    steps, decays = batch * T * H, K if per_channel else 1
    forward = operations(K, V) * steps
    inputs = 2 * K + V + decays + 1
    return BenchmarkCase(
        size=size,
        check_size=size | {"T": min(T, 4096)},
        scaling=("T", (512, 1024, 2048, 4096, 8192)),
        cost={
            "forward": Cost(4 * (inputs + V) * steps, forward, decays * steps),
            "backward": Cost(4 * (2 * inputs + V) * steps, 2 * forward, decays * steps),
        },
        make_arguments=make_arguments,
        implementations=measured(implementations),
        reference=implementations["ours, torch operators"],
    )
