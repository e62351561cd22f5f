"""How fast this machine multiplies matrices, scans and runs delta rules, measured once and kept.

The file `machine-speed.json` in the cache folder holds each rate under the names of the processor, the version of
torch and the number of threads. Another processor, version or number of threads is measured for itself, and so is
everything where the file is damaged or was removed.
"""

import datetime
import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from convert.core.errors import UserError
from convert.core.fields import broken
from convert.core.files import parse_json, sealed, unsealed, write_json
from convert.core.places import cache_folder
from kernels.delta_rule import kda, operations
from kernels.selective_scan import selective_scan

NAME = "machine-speed.json"
SECONDS = 0.5  # that each measurement takes (ours)


@dataclass(frozen=True)
class Rate:
    """Work per second, and the day on which it was measured. `file` keeps it; None where that cannot be written."""

    per_second: float
    measured: str
    file: Path | None

    @property
    def origin(self) -> str:
        """Words that say when the rate was measured, and how to measure it again."""
        if self.file is None:
            return "measured now"
        return f"measured on {self.measured} and kept; remove {self.file} to measure again"


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> Rate:
    """Floating-point operations per second of a matrix product."""

    def measure() -> float:
        n = 512 if device == "cpu" else 4096
        a = torch.randn(n, n, device=device, dtype=dtype)
        return _rate(lambda: a @ a, 2 * n**3, a.device)

    return _kept(f"matrix products in {str(dtype).removeprefix('torch.')}", device, measure)


@functools.cache
def scan_rate(device: str) -> Rate:
    """State updates per second of the selective scan, forward and backward."""

    def measure() -> float:
        where = torch.device(device)
        u, delta = (torch.rand(2, 512, 64, device=where, requires_grad=True) for _ in range(2))
        A = torch.rand(512, 64, device=where, requires_grad=True)
        B = torch.rand(2, 64, 64, device=where, requires_grad=True)
        return _rate(lambda: selective_scan(u, delta, -A, B, B).sum().backward(), u.numel() * 64, u.device)

    return _kept("selective scans", device, measure)


@functools.cache
def delta_rule_rate(device: str) -> Rate:
    """Operations per second of the delta rule with a decay per channel, forward and backward.

    On a GPU they are those of the chunked form: it needs none of the minutes in which flash-linear-attention's kernels
    tune themselves, and is the slower one."""

    def measure() -> float:
        where, K, T = torch.device(device), 64, 256
        q, k, v, g = (torch.rand(1, T, 4, K, device=where, requires_grad=True) for _ in range(4))
        beta = torch.rand(1, T, 4, device=where, requires_grad=True)
        impl = "auto" if where.type == "cpu" else "chunked"

        def call() -> None:
            kda(q, k, v, -g, beta, use_qk_l2norm_in_kernel=True, impl=impl)[0].sum().backward()

        return _rate(call, 3 * operations(K, K) * beta.numel(), where)

    return _kept("delta rules", device, measure)


def _kept(what: str, device: str, measure: Callable[[], float]) -> Rate:
    """The rate that is kept for this machine, or else the one that is measured, and kept where that can be."""
    key = f"{what}; {processor(device)}; torch {torch.__version__}; {torch.get_num_threads()} threads"
    try:
        file = cache_folder() / NAME
        rates = _read(file)
    except (OSError, UserError):  # of the folder; commands refuse such a cache themselves
        return Rate(measure(), _today(), None)
    if key not in rates:
        rates = {key: {"per_second": measure(), "measured": _today()}}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, sealed({"rates": _read(file) | rates}))  # read again: another process may have added to it
        except OSError:
            return Rate(rates[key]["per_second"], rates[key]["measured"], None)
    return Rate(rates[key]["per_second"], rates[key]["measured"], file)


def _read(file: Path) -> dict[str, dict]:
    """What the file holds; nothing where it is missing or damaged."""
    try:
        found = parse_json(file.read_bytes(), str(file))
        found["check"]  # the file was always sealed
        rates = unsealed(found)["rates"]
        if all(rate["per_second"] > 0 and broken(str, rate["measured"]) is None for rate in rates.values()):
            return rates
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def processor(device: str) -> str:
    """The name of what computes there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {device}"


def _today() -> str:
    return datetime.date.today().isoformat()


def _rate(call: Callable[[], object], work: float, device: torch.device) -> float:
    """Work per second of the best of many calls, because other programs only ever make one slower. On a CPU one thread
    is measured, too, and each further one counted half: beside other programs, threads that wait for each other are
    forty times as slow at one moment, and one thread never is."""
    found = work / _best(call, device)
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return found
    try:
        torch.set_num_threads(1)
        return max(found, work / _best(call, device) * (1 + threads) / 2)
    finally:
        torch.set_num_threads(threads)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest call within half a second."""
    call()  # compiles, and wakes the device
    times: list[float] = []
    ends = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < ends:
        _finish(device)
        start = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _finish(device: torch.device) -> None:
    """Wait for all that the device was asked to do."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
