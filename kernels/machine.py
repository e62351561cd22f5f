"""The machine under a measurement: its facts, its memory, its clock, and what it can do at most."""

import ctypes
import importlib.metadata
import platform
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peak:
    """The highest memory while it is open, above that at its start, in bytes: a GPU's own count, else what is resident, sampled."""

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.highest = _resident()
        self.open = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self):
        while self.open:
            self.highest = max(self.highest, _resident())
            time.sleep(0.001)

    def __exit__(self, *_):
        if self.device == "cuda":
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.open = False
            self.thread.join()
            self.highest = max(self.highest, _resident())
        self.bytes = self.highest - self.start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def give_back() -> None:
    """Memory that was freed but kept by glibc would be taken again unseen."""
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)


def stay_within_memory() -> None:
    """A contender that needs more than three quarters of what is free now fails, instead of having another process killed."""
    listed = Path("/proc/meminfo")
    if DEVICE == "cpu" and listed.exists():
        available = next(line.split()[1] for line in listed.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, 2 * (int(available) * 768,))  # of kB


def seconds(run: Callable, at_least: float) -> list[float]:
    """How long it takes, several times: three runs and `at_least` seconds of them, or more."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return [ms / 1e3 for ms in do_bench(run, rep=1e3 * at_least, return_mode="all")]
    start = time.perf_counter()
    run()
    enough = max(at_least, 2.5 * (time.perf_counter() - start))
    timer, times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()), []
    while len(times) < 3:
        times += timer.blocked_autorange(min_run_time=enough).times
    return times


def ceilings(at_least: float) -> dict:
    """The most that this machine did in a second: GB copied (read and written), float32 operations of a matrix product, exponentials."""
    a, b = torch.rand(1 << 25, device=DEVICE), torch.rand(1 << 25, device=DEVICE)  # more than a cache holds
    sides = (4096, 8192) if DEVICE == "cuda" else (256, 512, 1024)
    return {
        "copy_GB_s": 2 * a.nbytes / min(seconds(lambda: a.copy_(b), at_least)) / 1e9,
        "product_GFLOP_s": max(_products(side, at_least) for side in sides) / 1e9,
        "exponentials_G_s": _exponentials(at_least) / 1e9,
    }


def _products(side: int, at_least: float) -> float:
    m = torch.rand(side, side, device=DEVICE)
    return 2 * side**3 / min(seconds(lambda: m @ m, at_least))


def _exponentials(at_least: float) -> float:
    """torch's exp2 of what fits in a cache, not slower than the kernels' own; threads times what one does, because several would
    wait for each other longer than such a call takes."""
    x = torch.rand(1 << (22 if DEVICE == "cuda" else 17), device=DEVICE)
    out, threads = torch.empty_like(x), torch.get_num_threads()
    torch.set_num_threads(1)
    shortest = min(seconds(lambda: torch.exp2(x, out=out), 4 * at_least))  # one core of a busy machine: wait for a quiet moment
    torch.set_num_threads(threads)
    return x.numel() / shortest * (1 if DEVICE == "cuda" else threads)


def facts(packages: tuple[str, ...]) -> dict:
    """Of this machine, and the versions of those packages that are installed."""
    listed = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in listed.read_text(encoding="utf-8").splitlines() if "model name" in line]
        if listed.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
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
