"""The machine under a measurement: its description, its memory, its clock, and the highest rates that it reaches."""

import ctypes
import importlib.metadata
import platform
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch.utils.benchmark import Timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PeakMemory:
    """Context manager whose `bytes` is the highest memory inside it, above that at its start.

    On a GPU it is the allocator's own count; on a CPU the resident memory, sampled every millisecond.
    """

    bytes: int

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def __enter__(self) -> Self:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        self._start = self._highest = _resident_bytes()
        self._sampling = True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while self._sampling:
            self._highest = max(self._highest, _resident_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self._highest = torch.cuda.max_memory_allocated()
        else:
            self._sampling = False
            self._thread.join()
            self._highest = max(self._highest, _resident_bytes())
        self.bytes = self._highest - self._start


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def trim_heap() -> None:
    """Return freed memory from glibc to the system, so that using it again counts as new memory."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def limit_memory() -> None:
    """Limit this process to three quarters of the memory that is free now.

    An implementation that needs more then fails, instead of having another process killed.
    """
    meminfo = Path("/proc/meminfo")
    if DEVICE == "cpu" and meminfo.exists():
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        available_kb = int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
        limit = available_kb * 768  # three quarters, in bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def measure_seconds(run: Callable[[], object], min_seconds: float) -> list[float]:
    """Return the durations of several runs, in seconds: at least three runs, and `min_seconds` of running in all."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return [ms / 1e3 for ms in do_bench(run, rep=1e3 * min_seconds, return_mode="all")]
    start = time.perf_counter()
    run()
    block_seconds = max(min_seconds, 2.5 * (time.perf_counter() - start))
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    times: list[float] = []
    while len(times) < 3:
        times += timer.blocked_autorange(min_run_time=block_seconds).times
    return times


def ceilings(min_seconds: float) -> dict[str, float]:
    """Measure the roofline's ceilings: the highest rates of this machine, per second.

    They are GB copied (read and written), float32 operations of a matrix product, and exponentials.
    """
    a, b = torch.rand(1 << 25, device=DEVICE), torch.rand(1 << 25, device=DEVICE)  # larger than any cache
    sides = (4096, 8192) if DEVICE == "cuda" else (256, 512, 1024)
    return {
        "copy_GB_s": 2 * a.nbytes / min(measure_seconds(lambda: a.copy_(b), min_seconds)) / 1e9,
        "product_GFLOP_s": max(_matrix_product_rate(side, min_seconds) for side in sides) / 1e9,
        "exponentials_G_s": _exponential_rate(min_seconds) / 1e9,
    }


def _matrix_product_rate(side: int, min_seconds: float) -> float:
    m = torch.rand(side, side, device=DEVICE)
    return 2 * side**3 / min(measure_seconds(lambda: m @ m, min_seconds))


def _exponential_rate(min_seconds: float) -> float:
    """Measure torch's exp2 on data that fits in a cache, which is no slower than the kernels' own exponential.

    One thread is measured and multiplied by their number: several would wait for each other longer than a call.
    """
    x = torch.rand(1 << (22 if DEVICE == "cuda" else 17), device=DEVICE)
    out, threads = torch.empty_like(x), torch.get_num_threads()
    torch.set_num_threads(1)
    # four times as long, because one core of a busy machine must be met at a quiet moment
    shortest = min(measure_seconds(lambda: torch.exp2(x, out=out), 4 * min_seconds))
    torch.set_num_threads(threads)
    return x.numel() / shortest * (1 if DEVICE == "cuda" else threads)


def describe_machine(packages: tuple[str, ...]) -> dict:
    """Return processor, GPU, threads and system, and the versions of those packages that are installed."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: v for p in packages if (v := _version(p))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
