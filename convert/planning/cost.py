"""How quick this machine is: the rates by which a plan tells the time."""

import functools
import time
from collections.abc import Callable

import torch

from kernels.selective_scan import selective_scan

MATMUL_SHARE = 0.5  # of the measured matrix-product rate that training reaches (ours, measured on neox-nano)


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product."""
    n = 512 if device == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    return _rate(lambda: a @ a, 2 * n**3, a.device)


@functools.cache
def scan_rate(device: str) -> float:
    """State updates per second, forward and backward, of the selective scan."""
    shape = {"device": device, "requires_grad": True}
    u, delta = (torch.rand(2, 512, 64, **shape) for _ in range(2))
    A, B = torch.rand(512, 64, **shape), torch.rand(2, 64, 64, **shape)
    return _rate(lambda: selective_scan(u, delta, -A, B, B).sum().backward(), u.numel() * 64, u.device)


def _rate(call: Callable[[], object], work: float, device: torch.device) -> float:
    """Work per second, of the best of many calls: other programs only ever make one slower. On a CPU also by one
    thread, and each further one counted half: beside other programs threads that wait for each other are forty times as
    slow at one moment, one thread never is."""
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
    times, ends = [], time.perf_counter() + 0.5
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
