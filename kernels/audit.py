"""What the Triton kernels become on each device, compiled ahead of time by Triton's own compiler: no GPU is needed.

    python -m kernels.audit                                              # everything: four minutes the first time
    python -m kernels.audit "chunk_scan bf16" "selective_scan N=16" --targets sm_90,gfx942
    python -m kernels.audit --verbose --json audit.json                  # a line per configuration

The operators are called on tensors without data, and what they would launch is compiled instead, in every autotune
configuration (of a peer's kernels, where one is installed, in the first four). It fails on a spill, on use of the stack, on more
shared memory than a block may have, and on products of 16 bits (or tf32) without matrix instructions. `make check-triton` runs it
with the oldest Triton that setup.py allows, which is what the oldest torch there brings. MB: every tensor that a
launch is given, once. Gop: those of its program, see `targets.operations`. Time: the longest that memory, float32 units,
exponentials or matrix units at their published peak take.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from kernels.gpu_specs import TARGETS, Resources, Target, faults, operations, resources, roofline


@dataclass(frozen=True)
class Case:
    call: Callable  # makes tensors and launches an operator's kernels, forward and backward
    sizes: dict
    peer: str = ""  # the module, if the kernels are somebody else's

    def __str__(self) -> str:
        words = (k if v is True else f"{k}={v}" for k, v in self.sizes.items())
        return f"{self.call.__name__} {' '.join(words)}"


def selective_scan(N, batch=2, D=2048, L=2048, G=1, R=1, ones=False, documents=False, training=True) -> None:
    from kernels.selective_scan.fused import selective_scan_triton

    u, delta, A, B, C = _floats(training, (batch, D, L), (batch, D, L), (D, N), (batch, G, N, L), (batch, G * R, N, L))
    (h,) = _floats(training, (1 + ones, batch, D, N))
    starts = torch.empty(batch, L, dtype=torch.bool) if documents else None
    outputs, last = selective_scan_triton(u, delta, A, B, C, h, starts)
    _backward(*outputs, last)


def chunk_scan(N, batch=2, H=32, P=64, L=2048, R=1, ones=False, documents=False, bf16=False, training=True) -> None:
    from kernels.chunk_scan.fused import chunk_scan_triton

    dtype = torch.bfloat16 if bf16 else torch.float32
    x, B, C = _floats(training, (batch, L, H, P + ones), (batch, L, H, N), (batch, L, H, R, N), dtype=dtype)
    log_decay, S = _floats(training, (batch, L, H), (batch, H, N, P + ones))
    ids = torch.empty(batch, L, dtype=torch.int64) if documents else None
    _backward(*chunk_scan_triton(x, log_decay, B, C, S, ids))


def selective_state_update(N, batch=16, heads=1, P=4096, G=1, bf16=False) -> None:
    from kernels.selective_scan.fused_update import update_triton

    dtype = torch.bfloat16 if bf16 else torch.float32
    state, A, D, dt_bias = _floats(False, (batch, heads, P, N), (heads, P, N), (heads, P), (heads, P))
    x, dt, z, B, C = _floats(False, *[(batch, heads, P)] * 3, *[(batch, G, N)] * 2, dtype=dtype)
    update_triton(state, x, dt, A, B, C, D, z, dt_bias, True)


def mamba_ssm(N, batch=2, H=32, P=64, L=2048, training=False) -> None:  # its backward asks the GPU how large it is
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, B, C = _floats(training, (batch, L, H, P), (batch, L, 1, N), (batch, L, 1, N), dtype=torch.bfloat16)
    dt, A = _floats(training, (batch, L, H), (H,))
    _backward(mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=64))


def simple_gla(N, batch=2, H=32, P=64, L=2048) -> None:
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = _floats(True, (batch, L, H, N), (batch, L, H, N), (batch, L, H, P), dtype=torch.bfloat16)
    (g,) = _floats(True, (batch, L, H))
    _backward(chunk_simple_gla(q, k, v, g=g, scale=1.0)[0])


def _floats(training: bool, *shapes: tuple[int, ...], dtype=torch.float32) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, requires_grad=training) for shape in shapes]


def _backward(*outputs: Tensor) -> None:
    if outputs[0].requires_grad:
        sum(t.sum() for t in outputs).backward()


CASES = [
    Case(selective_scan, dict(N=16)),
    Case(selective_scan, dict(N=16, training=False)),
    Case(selective_scan, dict(N=16, batch=1)),
    Case(selective_scan, dict(N=100, G=4, R=2)),
    Case(selective_scan, dict(N=16, ones=True, documents=True)),
    Case(selective_scan, dict(N=512, G=4, R=2, ones=True, documents=True)),
    Case(chunk_scan, dict(N=16)),
    Case(chunk_scan, dict(N=16, batch=1)),
    Case(chunk_scan, dict(N=128)),
    Case(chunk_scan, dict(N=128, bf16=True)),
    Case(chunk_scan, dict(N=100, R=2, ones=True, documents=True)),
    Case(chunk_scan, dict(N=512, R=2, ones=True, documents=True, bf16=True)),
    Case(mamba_ssm, dict(N=128, training=False), "mamba_ssm.ops.triton.ssd_combined"),
    Case(simple_gla, dict(N=128), "fla.ops.simple_gla"),
    Case(selective_state_update, dict(N=16)),
    Case(selective_state_update, dict(N=100, heads=32, P=64, G=8, bf16=True)),
    Case(selective_state_update, dict(N=512)),
]


@dataclass(frozen=True)
class Row:
    """Of one kernel in one configuration for one target."""

    case: str
    kernel: str
    configuration: str
    target: str
    found: Resources | None  # None where it does not compile
    bytes: int
    operations: dict[str, float]
    seconds: float
    bound: str
    faults: list[str]


class Compiling:
    """Stands in for Triton's driver: a device that is compiled for, and that nothing is launched on."""

    def __init__(self, target: Target):
        self.target = target.gpu

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # what Triton files its compiled kernels under

    def get_current_stream(self, device):
        return 0


COMPILE = JITFunction.run


def audit(case: Callable[[], None], name: str, target: str, most: int | None = None) -> list[Row]:
    """A row for each kernel that a case launches, in each (or the first `most`) of its configurations. Nothing is launched."""
    rows = []

    def compiled(kernel, *args, grid, warmup, **kwargs):
        rows.append(_row(kernel, args, kwargs, grid, name, target))

    def configured(tuner, *args, **kwargs):
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs)[:most]:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    driver.set_active(Compiling(TARGETS[target]))
    instead = ((JITFunction, "run", compiled), (Autotuner, "run", configured), (torch.cuda, "device", lambda index: nullcontext()))
    with ExitStack() as stack, torch.device("meta"):
        for place in instead:
            stack.enter_context(mock.patch.object(*place))
        case()
    return rows


def _row(kernel: JITFunction, args: tuple, kwargs: dict, grid, case: str, target: str) -> Row:
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in kernel.signature.parameters})
    bound.apply_defaults()
    tensors = {id(v): v for v in bound.arguments.values() if isinstance(v, Tensor)}
    size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors.values())
    configuration = " ".join(f"{k}={v}" for k, v in kwargs.items() if isinstance(v, int | str) and (k, v) != ("num_ctas", 1))
    try:
        done = COMPILE(kernel, *args, grid=grid, warmup=True, **kwargs)
        found = resources(done)
    except Exception as e:  # whatever a compiler raises, the rest is still to be seen
        reason = (str(e).strip().splitlines() or [""])[0]
        return Row(
            case, kernel.__name__, configuration, target, None, size, {}, 0.0, "", [f"does not compile: {type(e).__name__} {reason}"]
        )
    numbers = [v if isinstance(v, int) else None for k, v in bound.arguments.items() if done.src.signature[k] != "constexpr"]
    work = operations(done.asm["ttir"], numbers, grid(bound.arguments) if callable(grid) else grid)
    times = roofline(size, work, TARGETS[target])
    limit = max(times, key=times.get)
    return Row(case, kernel.__name__, configuration, target, found, size, work, times[limit], limit, faults(found, TARGETS[target]))


def _task(case: Case, target: str) -> list[Row]:
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # of Triton 3.9, about its next version
    call = partial(case.call, **case.sizes)
    if not case.peer:
        return audit(call, str(case), target)
    try:
        importlib.import_module(case.peer)
        return audit(call, str(case), target, most=4)
    except Exception as e:  # a peer may want a GPU
        print(f"Without {case} for {target}: {type(e).__name__}: {e}", file=sys.stderr)
        return []


def _import(peers: set[str]) -> None:
    """At a worker's start: a peer asks Triton's driver which GPU there is, before `audit` replaces it. What fails is said by `_task`."""
    for peer in peers:
        with suppress(Exception):
            importlib.import_module(peer)


def audit_all(cases: list[Case], targets: list[str], console: Console) -> list[Row]:
    """In a process per core; rows in the order of cases and targets."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    peers = {case.peer for case in cases if case.peer}
    with (
        ProcessPoolExecutor(mp_context=spawn, initializer=_import, initargs=(peers,)) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task("compiling", total=len(cases) * len(targets))
        futures = {pool.submit(_task, case, target): f"{case} {target}" for case in cases for target in targets}
        for future in as_completed(futures):
            progress.update(bar, advance=1, description=f"compiled {futures[future]}")
        return [row for future in futures for row in future.result()]


def table(rows: list[Row], verbose: bool) -> Table:
    """A line per kernel, case and target: lowest and highest over its configurations, time of the best."""
    heads = ("registers", "spills", "stack", "shared KB", "of", "matrix", "MB", "Gop", "time us", "bound by")
    made = Table("kernel", "case", "target", box=None, pad_edge=False)
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, f"{row.case} {row.configuration if verbose else ''}", row.target), []).append(row)
    order = list(dict.fromkeys(key[:2] for key in groups))
    before = None
    for (*name, target), some in sorted(groups.items(), key=lambda group: order.index(group[0][:2])):
        made.add_row(*(name if name != before else ("", "")), target, *_cells(some, TARGETS[target]))
        before = name
    return made


def _cells(rows: list[Row], target: Target) -> list[str]:
    found = [row.found for row in rows if row.found]
    if not found:
        return ["does not compile"]
    spread = lambda values: "-".join(dict.fromkeys((f"{min(values):.4g}", f"{max(values):.4g}")))  # noqa: E731
    best = min((row for row in rows if row.found), key=lambda row: row.seconds)
    names = ("registers", "spills", "stack")
    return [
        *(spread([getattr(f, name) for f in found]) for name in names), spread([f.shared / 1024 for f in found]), f"{target.shared // 1024}",
        "-" if not any(f.products for f in found) else "yes" if all(f.matrix for f in found) else "NO",
        f"{best.bytes / 1e6:.1f}", f"{sum(best.operations.values()) / 1e9:.2f}", f"{best.seconds * 1e6:.1f}", best.bound,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="cases that have all words of one of these; default: all cases")
    parser.add_argument("--targets", default=",".join(TARGETS), help="default: %(default)s")
    parser.add_argument("--verbose", action="store_true", help="a line per configuration")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    targets = args.targets.split(",")
    cases = [case for case in CASES if not args.name or any(set(name.split()) <= set(str(case).split()) for name in args.name)]
    if not cases or set(targets) - set(TARGETS):
        parser.error(f"targets are {', '.join(TARGETS)}; cases are: {'; '.join(map(str, CASES))}.")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it.")
    console = Console(width=140)
    cases = [case for case in cases if not case.peer or importlib.util.find_spec(case.peer.partition(".")[0])]
    rows = audit_all(cases, targets, console)
    for call in dict.fromkeys(case.call for case in cases):
        sizes = (f"{k}={p.default}" for k, p in inspect.signature(call).parameters.items() if p.default is not p.empty)
        console.print(f"{call.__name__}, where a case says nothing else: {' '.join(sizes)}", highlight=False)
    console.print(table(rows, args.verbose), highlight=False)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    ours = [row for row in rows if row.case not in {str(case) for case in cases if case.peer}]
    wrong = [f"{row.case} · {row.kernel}[{row.configuration}] · {row.target}: {fault}" for row in ours for fault in row.faults]
    print(f"{len(ours)} compiled kernels of ours by Triton {triton.__version__}, {len(wrong)} faults", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
