"""Audit of the Triton kernels: Triton's own compiler compiles them ahead of time for each GPU, and no GPU is needed.

    python -m kernels.audit                                              # everything: four minutes the first time
    python -m kernels.audit "chunk_scan bf16" "selective_scan N=16" --targets sm_90,gfx942
    python -m kernels.audit --verbose --json audit.json                  # a line per configuration

The operators are called on tensors without data, and what they would launch is compiled instead, in every autotune
configuration (a baseline's kernels, where one is installed, in the first four). It fails on a spill (a few bytes:
only where registers have run out), on use of the stack, on more shared memory than a block may have, and on products of
16 bits (or tf32) without matrix instructions.
`make check-triton` runs it with the oldest Triton that setup.py allows, which is what the oldest torch there brings.

MB: every tensor that a launch is given, once. Gop: the operations of its program (triton_stats.operations). Time: the
longest that memory, float32 units, exponentials or matrix units at their published peak take.
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
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from kernels.audit_cases import CASES, AuditCase
from kernels.gpu_specs import GPU_SPECS, GpuSpec, roofline
from kernels.triton_stats import Resources, faults, operations, resources

COMPILE = JITFunction.run  # the original, while `audit` has replaced it


@dataclass(frozen=True)
class AuditRow:
    """One kernel in one configuration on one target."""

    case: str
    kernel: str
    configuration: str
    target: str
    resources: Resources | None  # None where it does not compile
    bytes: int
    operations: dict[str, float]
    seconds: float
    bound: str
    faults: list[str]


class CompileOnlyDriver:
    """Replacement of Triton's driver: a device that kernels are compiled for, and that runs nothing."""

    def __init__(self, spec: GpuSpec) -> None:
        self.target = spec.gpu

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # the key under which Triton stores its compiled kernels

    def get_current_stream(self, device: object) -> int:
        return 0


def audit(launch: Callable[[], None], name: str, target: str, max_configurations: int | None = None) -> list[AuditRow]:
    """Compile each kernel that a case launches, in each (or the first) of its configurations; nothing runs.

    Args:
        launch: launches the kernels.
        name: the name of the case in the rows.
        target: a key of GPU_SPECS.
    """
    rows = []

    def compile_kernel(kernel: JITFunction, *args: object, grid: Any, warmup: bool, **kwargs: object) -> None:
        rows.append(_compiled_row(kernel, args, kwargs, grid, name, target))

    def compile_configurations(tuner: Autotuner, *args: object, **kwargs: object) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs)[:max_configurations]:
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    driver.set_active(CompileOnlyDriver(GPU_SPECS[target]))
    replacements = (
        (JITFunction, "run", compile_kernel),
        (Autotuner, "run", compile_configurations),
        (torch.cuda, "device", lambda index: nullcontext()),
    )
    with ExitStack() as stack, torch.device("meta"):
        for owner, attribute, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        launch()
    return rows


def _compiled_row(kernel: JITFunction, args: tuple, kwargs: dict, grid: Any, case: str, target: str) -> AuditRow:
    spec = GPU_SPECS[target]
    bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in kernel.signature.parameters})
    bound.apply_defaults()
    tensors = {id(v): v for v in bound.arguments.values() if isinstance(v, Tensor)}
    size = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors.values())
    configuration = " ".join(
        f"{k}={v}" for k, v in kwargs.items() if isinstance(v, int | str) and (k, v) != ("num_ctas", 1)
    )
    row = partial(AuditRow, case, kernel.__name__, configuration, target)
    try:
        compiled = COMPILE(kernel, *args, grid=grid, warmup=True, **kwargs)
        found = resources(compiled)
    except Exception as e:  # whatever a compiler raises, the other kernels are still compiled
        reason = (str(e).strip().splitlines() or [""])[0]
        return row(None, size, {}, 0.0, "", [f"does not compile: {type(e).__name__} {reason}"])
    parameters = {k: v for k, v in bound.arguments.items() if compiled.src.signature[k] != "constexpr"}
    integers = [v if isinstance(v, int) else None for v in parameters.values()]
    counts = operations(compiled.asm["ttir"], integers, grid(bound.arguments) if callable(grid) else grid)
    times = roofline(size, counts, spec)
    limit = max(times, key=lambda name: times[name])
    return row(found, size, counts, times[limit], limit, faults(found, spec))


def _audit_task(case: AuditCase, target: str) -> list[AuditRow]:
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 warns about its next version
    launch = partial(case.launch, **case.sizes)
    if not case.baseline:
        return audit(launch, str(case), target)
    try:
        importlib.import_module(case.baseline)
        return audit(launch, str(case), target, max_configurations=4)
    except Exception as e:  # a baseline may need a GPU
        print(f"Without {case} for {target}: {type(e).__name__}: {e}", file=sys.stderr)
        return []


def _import_baselines(modules: set[str]) -> None:
    """Import baselines at a worker's start: they ask Triton's driver for the GPU, before `audit` replaces it.

    An import that fails here is reported by `_audit_task`.
    """
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)


def audit_all(cases: list[AuditCase], targets: list[str], console: Console) -> list[AuditRow]:
    """Audit in a process per core; the rows are in the order of cases and targets."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    baselines = {case.baseline for case in cases if case.baseline}
    with (
        ProcessPoolExecutor(mp_context=spawn, initializer=_import_baselines, initargs=(baselines,)) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        bar = progress.add_task("compiling", total=len(cases) * len(targets))
        tasks = {pool.submit(_audit_task, case, target): f"{case} {target}" for case in cases for target in targets}
        for task in as_completed(tasks):
            progress.update(bar, advance=1, description=f"compiled {tasks[task]}")
        return [row for task in tasks for row in task.result()]


def make_table(rows: list[AuditRow], verbose: bool) -> Table:
    """Make a line per kernel, case and target: lowest and highest over its configurations, and the best one's time."""
    headings = ("registers", "spills", "stack", "shared KB", "of", "matrix", "MB", "Gop", "time us", "bound by")
    table = Table("kernel", "case", "target", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str, str], list[AuditRow]] = {}
    for row in rows:
        name = f"{row.case} {row.configuration if verbose else ''}"
        groups.setdefault((row.kernel, name, row.target), []).append(row)
    order = list(dict.fromkeys(key[:2] for key in groups))
    previous = None
    for (kernel, name, target), group in sorted(groups.items(), key=lambda item: order.index(item[0][:2])):
        labels = ("", "") if (kernel, name) == previous else (kernel, name)
        table.add_row(*labels, target, *_cells(group, GPU_SPECS[target]))
        previous = (kernel, name)
    return table


def _cells(rows: list[AuditRow], spec: GpuSpec) -> list[str]:
    found = [row.resources for row in rows if row.resources]
    if not found:
        return ["does not compile"]
    best = min((row for row in rows if row.resources), key=lambda row: row.seconds)
    matrix = "-" if not any(r.products for r in found) else "yes" if all(r.matrix for r in found) else "NO"
    return [
        *(_range([getattr(r, name) for r in found]) for name in ("registers", "spills", "stack")),
        _range([r.shared / 1024 for r in found]),
        f"{spec.shared // 1024}",
        matrix,
        f"{best.bytes / 1e6:.1f}",
        f"{sum(best.operations.values()) / 1e9:.2f}",
        f"{best.seconds * 1e6:.1f}",
        best.bound,
    ]


def _range(values: list[float]) -> str:
    return "-".join(dict.fromkeys((f"{min(values):.4g}", f"{max(values):.4g}")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="cases that have all words of one of these; default: all cases")
    parser.add_argument("--targets", default=",".join(GPU_SPECS), help="default: %(default)s")
    parser.add_argument("--verbose", action="store_true", help="a line per configuration")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    targets = args.targets.split(",")
    chosen = [set(name.split()) for name in args.name] or [set()]
    cases = [case for case in CASES if any(words <= set(str(case).split()) for words in chosen)]
    if not cases or set(targets) - set(GPU_SPECS):
        parser.error(f"targets are {', '.join(GPU_SPECS)}; cases are: {'; '.join(map(str, CASES))}.")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it.")
    console = Console(width=140)
    cases = [c for c in cases if not c.baseline or importlib.util.find_spec(c.baseline.partition(".")[0])]
    rows = audit_all(cases, targets, console)
    for launch in dict.fromkeys(case.launch for case in cases):
        parameters = inspect.signature(launch).parameters.items()
        defaults = (f"{k}={p.default}" for k, p in parameters if p.default is not p.empty)
        console.print(f"{launch.__name__}, where a case says nothing else: {' '.join(defaults)}", highlight=False)
    console.print(make_table(rows, args.verbose), highlight=False)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    ours = [row for row in rows if row.case not in {str(case) for case in cases if case.baseline}]
    wrong = [
        f"{row.case} · {row.kernel}[{row.configuration}] · {row.target}: {fault}"
        for row in ours
        for fault in row.faults
    ]
    print(f"{len(ours)} compiled kernels of ours by Triton {triton.__version__}, {len(wrong)} faults", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
