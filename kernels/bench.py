"""Times, memory and errors of the kernels, beside every baseline that is installed.

    python -m kernels.bench                                          # all cases, then ours over growing lengths
    python -m kernels.bench selective_scan --size L=4096 batch=1     # one of them, at another size
    python -m kernels.bench delta_rule                               # both delta rules
    python -m kernels.bench --json bench.json --plot bench.png       # everything that is printed, and more digits

Every implementation runs in a process of its own, one after another. Its output and gradients are compared with float64
first, and a wrong one gets no time. The same call measures the ceilings: copy, float32 matrix product,
exponentials. On a GPU with mamba-ssm, impl="auto" takes the faster of ours and theirs from then on, if theirs is as
exact as ours must be (kernels/measured.py).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kernels.baselines import CASES, GROUPS
from kernels.bench_case import (
    BASELINES,
    BY_IMPL,
    GPU_ONLY,
    OURS,
    BenchmarkCase,
    Cost,
    Run,
    Size,
    output_gradient,
    why_not_measured,
)
from kernels.bench_report import format_opening, format_size, plot, print_table
from kernels.machine import DEVICE, PeakMemory, ceilings, describe_machine, limit_memory, measure_seconds, trim_heap
from kernels.measured import keep_fastest

MAX_ERROR = 1e-3  # relative RMS error from which a result is called wrong
MAX_TF32_ERROR = 1e-2  # the same for a baseline that multiplies float32 in tf32, whose 10 bits make 5e-4 to 2e-3 of it
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
TIMEOUT_S = 600  # limit of one implementation, its check and all its times together


# ------------------------------------------------------------------------------ in the process of one implementation


def relative_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative RMS error among results and gradients; NaN if one of them is NaN."""
    errors = [
        ((r.double() - e).square().mean() / e.square().mean().clamp(min=1e-30)).sqrt()
        for r, e in zip(results, expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def max_error(implementation: str, device: str) -> float:
    """Return the relative RMS error from which a result of an implementation is called wrong."""
    return MAX_TF32_ERROR if device == "cuda" and implementation.split(",")[0] in GPU_ONLY else MAX_ERROR


def measure(case: str, implementation: str, size: Size, min_seconds: float) -> dict:
    """Measure memory, error and, if that is small, times of one implementation in this process.

    Args:
        min_seconds: how long each time is measured at least.
    """
    full = CASES[case](size)
    run, arguments = full.implementations[implementation], full.make_arguments()
    small = CASES[case]({k: min(v, 16) for k, v in full.size.items()})
    small.results(run, small.make_arguments())  # imports, compiles and starts threads
    trim_heap()
    with PeakMemory(DEVICE) as peak:
        results = full.results(run, arguments)
    if full.check_size != full.size:
        part = CASES[case](full.check_size)
        results = part.results(part.implementations[implementation], part.make_arguments())
    row: dict = {
        "case": case,
        "implementation": implementation,
        "size": full.size,
        "check_size": full.check_size,
        "peak_bytes": peak.bytes,
        "error": relative_error(results, _expected(CASES[case](full.check_size))),
    }
    del results  # as large as all gradients
    return row | _times(full, run, arguments, min_seconds) if row["error"] < max_error(implementation, DEVICE) else row


def _expected(case: BenchmarkCase) -> list[Tensor]:
    return case.results(case.reference, {k: v.double() for k, v in case.make_arguments().items()})


def _times(case: BenchmarkCase, run: Run, arguments: dict[str, Tensor], min_seconds: float) -> dict[str, float]:
    """Measure each phase in seconds: median and half the distance between the quartiles; `time_s` is the whole."""
    times = {}

    def record(phase: str, call: Callable[[], object]) -> None:
        seconds = torch.tensor(measure_seconds(call, min_seconds), dtype=torch.float64)
        low, median, high = seconds.quantile(QUARTILES).tolist()
        times[f"{phase}_s"], times[f"{phase}_spread_s"] = median, (high - low) / 2

    with torch.no_grad():
        record("forward", lambda: run(arguments))
    if case.has_gradients:
        leaves = {k: v.requires_grad_() for k, v in arguments.items()}
        y = run(leaves)
        dy = output_gradient(y)
        record("backward", lambda: torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True))
        del y
        record("both", lambda: torch.autograd.grad(run(leaves), [*leaves.values()], dy))
    return times | {"time_s": times["both_s" if case.has_gradients else "forward_s"]}


# -------------------------------------------------------------------------------------------------- rows of the tables


def compare(case: str, size: Size, min_seconds: float, rates: dict[str, float]) -> Iterator[dict]:
    """Yield a row for ours and each baseline.

    Ratios are to ours, which is measured again at a smaller size where a baseline cannot take this one.
    """
    full = CASES[case](size)
    base: dict = {}
    ours = next(iter(full.implementations))
    for implementation in full.implementations:
        limits = {k: v for k, v in full.size_limits.get(implementation, {}).items() if v < full.size[k]}
        at = CASES[case](full.size | limits)
        if base.get("size") != at.size:
            base = measure_in_process(case, ours, at.size, min_seconds)
        row = base if implementation == ours else measure_in_process(case, implementation, at.size, min_seconds)
        label = ", ".join([implementation, *filter(None, [format_size(limits)])])
        yield row | {"table": "baselines", "label": label} | ratios(row, base, at.cost, rates)


def scale(case: str, size: Size, min_seconds: float, rates: dict[str, float]) -> Iterator[dict]:
    """Yield a row for ours at each length; ratios are to `size`, measured again because a machine changes with time."""
    implementation = next(iter(CASES[case](size).implementations))
    base = measure_in_process(case, implementation, CASES[case](size).size, min_seconds)
    name, values = CASES[case](size).scaling
    for value in values:
        at = CASES[case](base["size"] | {name: value})
        row = base if at.size == base["size"] else measure_in_process(case, implementation, at.size, min_seconds)
        labels = {"table": "scaling", "label": f"{name}={value}", "length": value}
        yield row | labels | ratios(row, base, at.cost, rates)


def faster(rows: list[dict]) -> str | None:
    """Return which implementation of an operator "auto" is to take, by the rows of `compare`; None where they do not
    say. One that is less exact than ours must be is not taken, however fast."""
    times = {row["implementation"]: row["time_s"] for row in rows if "time_s" in row and row["error"] < MAX_ERROR}
    if "ours" not in times or not any(row["implementation"] == BY_IMPL for row in rows):
        return None
    return "mamba_ssm" if times.get(BY_IMPL, times["ours"]) < times["ours"] else OURS


def measure_in_process(case: str, implementation: str, size: Size, min_seconds: float) -> dict:
    """Call `measure` in a process of its own; a row with "failed" says why it has no numbers."""
    row = {"case": case, "implementation": implementation, "size": size}
    command = [sys.executable, "-m", "kernels.bench", "--one", json.dumps(row | {"min_seconds": min_seconds})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"took longer than {TIMEOUT_S} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else [f"ended by signal {-done.returncode}"]
        return row | {"failed": " ".join(last)}
    dispatch = [line for line in done.stderr.splitlines() if " runs on this " in line]  # the choice of impl="auto"
    return json.loads(done.stdout.splitlines()[-1]) | {"dispatch": dispatch}


def ratios(row: dict, base: dict, cost: dict[str, Cost], rates: dict[str, float]) -> dict:
    """Compare a row that has a time with another row, with the ceilings, and with the least time that they allow."""
    if "time_s" not in row:
        return {}
    size, operations = sum(c.bytes for c in cost.values()), sum(c.operations for c in cost.values())
    limits = [roofline_bound(c, rates) for c in cost.values()]
    found = {"GB_s": size / row["time_s"] / 1e9, "GFLOP_s": operations / row["time_s"] / 1e9}
    found |= {"of_copy": found["GB_s"] / rates["copy_GB_s"], "of_product": found["GFLOP_s"] / rates["product_GFLOP_s"]}
    found |= {"bound_s": sum(s for s, _ in limits), "bound_by": max(limits)[1]}
    found["bound_ratio"] = row["time_s"] / found["bound_s"]
    if "time_s" in base:
        found["time_ratio"] = row["time_s"] / base["time_s"]
        found["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
    return found


def roofline_bound(cost: Cost, rates: dict[str, float]) -> tuple[float, str]:
    """Return the least time in seconds, and what sets it: bytes at the rate of a copy, or exponentials at theirs."""
    return max(
        (cost.bytes / rates["copy_GB_s"] / 1e9, "bytes"),
        (cost.exponentials / rates["exponentials_G_s"] / 1e9, "exponentials"),
    )


# -------------------------------------------------------------------------------------------------------- the command


def _size_item(word: str) -> tuple[str, int]:
    name, value = word.split("=")
    return name, int(value)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", choices=[*CASES, *GROUPS], help="default: all")
    parser.add_argument(
        "--size", nargs="+", type=_size_item, default=[], metavar="L=4096", help="where it is not the standard one"
    )
    parser.add_argument(
        "--scaling", action=argparse.BooleanOptionalAction, default=True, help="the tables over growing lengths"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, at least, for each time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # the process of one implementation
    args = parser.parse_args(words)
    args.size = dict(args.size)
    args.cases = GROUPS.get(args.name, (args.name,)) if args.name else tuple(CASES)
    if args.size and (not args.name or args.size.keys() - CASES[args.cases[0]]({}).size):
        known = format_size(CASES[args.cases[0]]({}).size) if args.name else "none"
        parser.error(f"--size goes with a name, and has parts of its size: {known}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse_arguments(words)
    if args.one:
        limit_memory()
        print(json.dumps(measure(**args.one)))
        return
    not_measured = {name: reason for name in BASELINES if (reason := why_not_measured(name))}
    machine = describe_machine(("torch", "triton", *BASELINES)) | {"not_measured": not_measured}
    rates, rows = ceilings(args.seconds), []
    print(format_opening(machine, rates), flush=True)
    for case in args.cases:
        compared = print_table(compare(case, args.size, args.seconds, rates))
        if DEVICE == "cuda" and (best := faster(compared)) is not None:
            keep_fastest(case, best)
        rows += compared
        if args.scaling:
            rows += print_table(scale(case, args.size, args.seconds, rates))
        if args.json:
            found = {"machine": machine, "ceilings": rates, "rows": rows}
            args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if args.plot:
        plot(rows, {case: CASES[case]({}).scaling[0] for case in CASES}, args.plot)


if __name__ == "__main__":
    main()
