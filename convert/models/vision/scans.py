"""The scans over places of an image classifier, recorded while it computes: what terms compare, and what is counted.

B images · E channels · H height · W width · N state · L places · r rank · 4 directions
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from convert.mixers.ss2d import DiagonalScan
from convert.mixers.ss2d_lowrank import LowRankScan
from convert.mixers.ss2d_states import diagonal_states, low_rank_states, mean_transition
from convert.objectives.stages import Scan, ScanShape

Call = tuple[nn.Module, tuple[Tensor, ...]]  # a scan, and what it was given


@contextmanager
def recorded(model: nn.Module | None) -> Iterator[list[Call]]:
    """The scans that a model calls from here on, in their order; none where there is no model."""
    calls = list[Call]()

    def note(scan: nn.Module, given: Any) -> None:
        calls.append((scan, given))

    hooks = [scan.register_forward_pre_hook(note) for scan in scans_of(model)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def scans_of(model: nn.Module | None) -> list[nn.Module]:
    """The scans over places of a model."""
    modules = () if model is None else model.modules()
    return [module for module in modules if isinstance(module, DiagonalScan | LowRankScan)]


def scan_of(scan: nn.Module, given: tuple[Tensor, ...]) -> Scan:
    """The transitions and states of a call. A scan whose decays differ by channel and place has those of
    `mean_transition`; its states are its own."""
    if isinstance(scan, LowRankScan):
        x, delta, U, sigma, V, B, _, _, bias = given
        return Scan(U, sigma, V, lambda: low_rank_states(x, delta, U, sigma, V, B, bias))
    x, delta, A, B, _, _, bias = given
    return Scan(*mean_transition(A, bias), lambda: diagonal_states(x, delta, A, B, bias))


def shape_of(scan: nn.Module, given: tuple[Tensor, ...]) -> ScanShape:
    """The sizes of a call."""
    x, states = given[0], given[2].shape[1] if isinstance(scan, LowRankScan) else given[2].shape[2]
    rank = given[2].shape[2] if isinstance(scan, LowRankScan) else states
    return ScanShape(x.shape[2] * x.shape[3], x.shape[1], states, rank)


def operations_of(scan: nn.Module, given: tuple[Tensor, ...]) -> int:
    """Floating-point operations of a call, step by step, whatever way it is computed.

    A diagonal scan has 9 for each place, channel, state and direction, as VMamba's authors count. A scan of low rank
    has r^2 + 2 r + 1 multiplications for each place, channel and direction, and N (2 r + 1) for each place and
    direction, each with an addition."""
    shape, images = shape_of(scan, given), given[0].shape[0]
    if isinstance(scan, LowRankScan):
        r = shape.rank
        each = 2 * (shape.channels * (r**2 + 2 * r + 1) + shape.states * (2 * r + 1))
    else:
        each = 9 * shape.channels * shape.states
    return 4 * images * shape.places * each
