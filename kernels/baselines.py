"""The cases of `kernels.bench`: each operator at a size, beside every baseline."""

from collections.abc import Callable

from kernels.baselines_chunk_scan import chunk_scan_case
from kernels.baselines_delta_rule import gated_delta_rule_case, kda_case
from kernels.baselines_selective_scan import hedgemamba_case, selective_scan_case, state_update_case
from kernels.baselines_ss2d import ss2d_case, ss2d_lowrank_case
from kernels.bench_case import BenchmarkCase, Size

CASES: dict[str, Callable[[Size], BenchmarkCase]] = {
    "selective_scan": selective_scan_case,
    "hedgemamba": hedgemamba_case,
    "chunk_scan": chunk_scan_case,
    "kda": kda_case,
    "gated_delta_rule": gated_delta_rule_case,
    "selective_state_update": state_update_case,
    "ss2d": ss2d_case,
    "ss2d_lowrank": ss2d_lowrank_case,
}
GROUPS = {"delta_rule": ("kda", "gated_delta_rule")}  # names of several cases of the same sizes
