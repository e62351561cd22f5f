"""Data sheets of the GPUs that the Triton kernels are audited for, and the least time that they allow."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class GpuSpec:
    """A GPU and its peak rates per second. Products of tf32 reach half of `bf16` (dense) on all of these."""

    device: str
    gpu: GPUTarget
    shared: int  # bytes of shared memory that a block may have
    memory: float  # bytes
    float32: float  # operations
    bf16: float  # operations of matrix products
    exp: float  # exponentials


# Sources: the data sheets of NVIDIA's A100 80GB SXM, H100 SXM and HGX B200, and of AMD's MI300X. Shared memory: the
# table of compute capabilities in the CUDA programming guide (163, 227, 227 KB); CDNA3 ISA guide (64 KB). Exponentials:
# 16 per clock and multiprocessor (CUDA programming guide, arithmetic throughput), as many per CDNA3 compute unit, times
# units and clock.
GPU_SPECS = {
    "sm_80": GpuSpec("A100 80GB", GPUTarget("cuda", 80, 32), 163 * 1024, 2.039e12, 19.5e12, 312e12, 2.4e12),
    "sm_90": GpuSpec("H100 SXM", GPUTarget("cuda", 90, 32), 227 * 1024, 3.35e12, 66.9e12, 989e12, 4.2e12),
    "sm_100": GpuSpec("B200", GPUTarget("cuda", 100, 32), 227 * 1024, 8e12, 75e12, 2250e12, 4.7e12),
    "gfx942": GpuSpec("MI300X", GPUTarget("hip", "gfx942", 64), 64 * 1024, 5.3e12, 163.4e12, 1307e12, 10.2e12),
}


def roofline(size: int, operations: dict[str, float], spec: GpuSpec) -> dict[str, float]:
    """Return the seconds that each limit sets: memory, float32 units, exponentials, matrix units.

    Args:
        size: bytes that are read and written.
        operations: counts by kind, from triton_stats.operations.
    """
    return {
        "memory": size / spec.memory,
        "float32": operations["float32"] / spec.float32,
        "exp": operations["exp"] / spec.exp,
        "matrix": operations["bf16"] / spec.bf16 + operations["tf32"] / (spec.bf16 / 2),
    }
