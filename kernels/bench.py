"""Times, memory and errors of the kernels, beside every peer that is installed.

    python -m kernels.bench                                          # all cases, then ours over growing lengths
    python -m kernels.bench selective_scan --size L=4096 batch=1     # one of them, at another size
    python -m kernels.bench --json bench.json --plot bench.png       # everything that is printed, and more digits

Every contender runs in a process of its own, one after another. Its output and gradients are compared with float64 first, and a
wrong one gets no time. Ceilings (copy, float32 matrix product, exponentials) are measured in the same call.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kernels.baselines import CASES, ON_A_GPU, PEERS, Cost, Run, Work, gradient_of, why_not
from kernels.machine import DEVICE, Peak, ceilings, facts, give_back, seconds, stay_within_memory

WRONG = 1e-3  # relative RMS error from which a result is called wrong
WRONG_IN_TF32 = 1e-2  # of a peer that multiplies float32 in tf32, whose 10 bits make 5e-4 to 2e-3 of it
PHASES = ("forward", "backward", "both")
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
PATIENCE = 600  # seconds that one contender may take, its check and all its times together


# --------------------------------------------------------------------------------------------------- in a contender's process


def error(found, exact) -> float:
    """The largest relative RMS error among results and gradients; NaN if there is one."""
    each = [((f.double() - e).square().mean() / e.square().mean().clamp(min=1e-30)).sqrt() for f, e in zip(found, exact, strict=True)]
    return torch.stack(each).max().item()


def one(case: str, contender: str, size: dict, at_least: float) -> dict:
    """Memory, error and, if that is small, times of one contender, measured in this process."""
    work = CASES[case](size)
    run, arguments = work.contenders[contender], work.make()
    small = CASES[case]({k: min(v, 16) for k, v in work.size.items()})
    small.results(run, small.make())  # imports, compiles, starts threads
    give_back()
    with Peak(DEVICE) as peak:
        found = work.results(run, arguments)
    if work.check != work.size:
        check = CASES[case](work.check)
        found = check.results(check.contenders[contender], check.make())
    row = {"case": case, "contender": contender, "size": work.size, "check_size": work.check, "peak_bytes": peak.bytes}
    row["error"] = _error_of(found, CASES[case](work.check))
    del found  # as much as all gradients
    return row | _times(work, run, arguments, at_least) if row["error"] < bound(contender, DEVICE) else row


def bound(contender: str, device: str) -> float:
    """The relative RMS error from which a contender's result is called wrong."""
    return WRONG_IN_TF32 if device == "cuda" and contender.split(",")[0] in ON_A_GPU else WRONG


def _error_of(found: list[torch.Tensor], check: Work) -> float:
    return error(found, check.results(check.exact, {k: v.double() for k, v in check.make().items()}))


def _times(work: Work, run: Run, arguments: dict, at_least: float) -> dict:
    """Of each phase, and as `time_s` of all of it."""
    times = {}

    def measure(phase: str, what: Callable) -> None:
        low, median, high = torch.tensor(seconds(what, at_least), dtype=torch.float64).quantile(QUARTILES).tolist()
        times[f"{phase}_s"], times[f"{phase}_spread_s"] = median, (high - low) / 2

    with torch.no_grad():
        measure("forward", lambda: run(arguments))
    if work.gradients:
        leaves = {k: v.requires_grad_() for k, v in arguments.items()}
        y = run(leaves)
        dy = gradient_of(y)
        measure("backward", lambda: torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True))
        del y
        measure("both", lambda: torch.autograd.grad(run(leaves), [*leaves.values()], dy))
    return times | {"time_s": times["both_s" if work.gradients else "forward_s"]}


# ------------------------------------------------------------------------------------------------------------------- the rows


def versus(case: str, size: dict, at_least: float, rates: dict) -> Iterator[dict]:
    """A row for ours and each peer; ratios are to ours, which is measured again where a peer cannot take the size."""
    work, base = CASES[case](size), {}
    ours = next(iter(work.contenders))
    for contender in work.contenders:
        smaller = {k: v for k, v in work.smaller.get(contender, {}).items() if v < work.size[k]}
        at = CASES[case](work.size | smaller)
        if base.get("size") != at.size:
            base = in_a_process(case, ours, at.size, at_least)
        row = base if contender == ours else in_a_process(case, contender, at.size, at_least)
        label = ", ".join([contender, *filter(None, [_words(smaller)])])
        yield row | {"table": "peers", "label": label} | ratios(row, base, at.cost, rates)


def growing(case: str, size: dict, at_least: float, rates: dict) -> Iterator[dict]:
    """A row for ours at each length; ratios are to the one of `size`, measured again: a machine changes with time."""
    contender = next(iter(CASES[case](size).contenders))
    base = in_a_process(case, contender, CASES[case](size).size, at_least)
    name, values = CASES[case](size).grows
    for value in values:
        work = CASES[case](base["size"] | {name: value})
        row = base if work.size == base["size"] else in_a_process(case, contender, work.size, at_least)
        yield row | {"table": "growing", "label": f"{name}={value}", "length": value} | ratios(row, base, work.cost, rates)


def in_a_process(case: str, contender: str, size: dict, at_least: float) -> dict:
    row = {"case": case, "contender": contender, "size": size}
    command = [sys.executable, "-m", "kernels.bench", "--one", json.dumps(row | {"at_least": at_least})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"took longer than {PATIENCE} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else [f"ended by signal {-done.returncode}"]
        return row | {"failed": " ".join(last)}
    said = [line for line in done.stderr.splitlines() if " runs on this " in line]  # which implementation "auto" took
    return json.loads(done.stdout.splitlines()[-1]) | {"said": said}


def ratios(row: dict, base: dict, cost: dict[str, Cost], rates: dict) -> dict:
    """Of a row with a time: against another row, against the ceilings, and against the least time that they allow."""
    if "time_s" not in row:
        return {}
    size, operations = sum(c.bytes for c in cost.values()), sum(c.operations for c in cost.values())
    limits = [least(c, rates) for c in cost.values()]
    found = {"GB_s": size / row["time_s"] / 1e9, "GFLOP_s": operations / row["time_s"] / 1e9}
    found |= {"of_copy": found["GB_s"] / rates["copy_GB_s"], "of_product": found["GFLOP_s"] / rates["product_GFLOP_s"]}
    found |= {"bound_s": sum(s for s, _ in limits), "bound_by": max(limits)[1]}
    found["bound_ratio"] = row["time_s"] / found["bound_s"]
    if "time_s" in base:
        found["time_ratio"] = row["time_s"] / base["time_s"]
        found["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
    return found


def least(cost: Cost, rates: dict) -> tuple[float, str]:
    """Seconds, and what takes them: bytes at the rate of a copy, or exponentials at theirs."""
    return max(
        (cost.bytes / rates["copy_GB_s"] / 1e9, "bytes"),
        (cost.exponentials / rates["exponentials_G_s"] / 1e9, "exponentials"),
    )


# ----------------------------------------------------------------------------------------------------------------- the tables


LEGEND = """times: median ± half the distance between the quartiles; backward alone runs on a kept graph
ratio: to ours at the same size, or at growing sizes to the standard one; the second ratio is of memory
bound: the time over the least that the definition's bytes (at the rate of a copy) or exponentials take on this machine
GB/s, GFLOP/s: of forward and backward together, what the definition needs, counted once; behind them the share of a copy, of a product
memory: the most that forward and backward take above their inputs · error: the largest relative RMS error of results and gradients"""
COLUMNS = (("forward", 15), ("backward", 15), ("both", 15), ("ratio", 7), ("bound", 7), ("GB/s", 7), ("copy", 6), ("GFLOP/s", 8), ("prod.", 7),
           ("memory", 9), ("ratio", 7), ("error", 9))  # fmt: skip


def heading(row: dict) -> str:
    """Of a table whose first row is this one."""
    unit, scale = _unit(row)
    what = f"{row['case']}, ours at growing sizes, float32"
    if row["table"] == "peers":
        what = f"{row['case']}, ours and peers · {_words(row['size'])}, float32"
        what += f" · bound {_number(row['bound_s'] * scale)} {unit}, set by {row['bound_by']}" if "bound_s" in row else ""
    return f"\n{what}\n{unit + ', MB':23}{''.join(f'{name:>{width}}' for name, width in COLUMNS)}"


def _words(size: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in size.items())


def _unit(row: dict) -> tuple[str, float]:
    return ("ms", 1e3) if row.get("time_s", 1) > 1e-3 else ("µs", 1e6)


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.0f}"


def line(row: dict, scale: float) -> str:
    """Times in 1 / scale seconds; none of a wrong result."""
    name = f"{row['label']:23}"
    if "failed" in row:
        return f"{name}failed: {row['failed'][:110]}"
    if "time_s" not in row:
        return f"{name}WRONG, so no time: relative error {row['error']:.1e}"
    times = [f"{_number(row[f'{p}_s'] * scale)} ±{_number(row[f'{p}_spread_s'] * scale)}" if f"{p}_s" in row else "-" for p in PHASES]
    time_ratio, peak_ratio = (_number(row[k]) if row.get(k) is not None else "-" for k in ("time_ratio", "peak_ratio"))
    cells = [
        *times, time_ratio, _number(row["bound_ratio"]), _number(row["GB_s"]), f"{row['of_copy']:.0%}", f"{row['GFLOP_s']:.1f}",
        f"{row['of_product']:.1%}", f"{row['peak_bytes'] / 1e6:.1f}", peak_ratio, f"{row['error']:.1e}",
    ]  # fmt: skip
    return name + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def table(rows: Iterator[dict]) -> list[dict]:
    """Prints each row as soon as it is there; returns them all."""
    done = []
    for row in rows:
        if not done:
            print(heading(row))
        done.append(row)
        print(line(row, _unit(done[0])[1]), flush=True)
    for note in dict.fromkeys(note for row in done for note in _notes(row)):
        print(note)
    return done


def _notes(row: dict) -> list[str]:
    smaller = {k: v for k, v in row.get("check_size", {}).items() if v < row["size"][k]}
    return [f"errors are measured at {_words(smaller)} at most"] * bool(smaller) + row.get("said", [])


def opening(machine: dict, rates: dict) -> str:
    versions = " ".join(f"{package} {version}" for package, version in machine["versions"].items())
    missing = ", ".join(f"{peer} ({reason})" for peer, reason in machine["not_measured"].items())
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads · {versions}\n"
        f"copy {rates['copy_GB_s']:.1f} GB/s · float32 product {rates['product_GFLOP_s']:.0f} GFLOP/s"
        f" · exponentials {rates['exponentials_G_s']:.2f} G/s\nnot measured: {missing or 'none'}\n\n{LEGEND}"
    )


def plot(rows: list[dict], file: Path) -> None:
    """Bars: ours and the peers; lines: ours over growing lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "time_s" in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(2, len(cases), figsize=(5 * len(cases), 6), squeeze=False)
    for (above, below), case in zip(axes.T, cases, strict=True):
        some = [row for row in rows if row["case"] == case]
        peers, lengths = ([row for row in some if row["table"] == table] for table in ("peers", "growing"))
        above.barh([row["label"] for row in peers], [row.get("time_ratio", 0) for row in peers])
        above.set(title=case, xlabel="time, ours = 1", xscale="log", xlim=(0.5, None))
        highest = max([row.get("time_ratio", 0) for row in peers], default=1)
        ticks = [n * 10**e for e in range(6) for n in (1, 3) if n * 10**e <= max(highest, 3)]
        above.minorticks_off()
        above.set_xticks(ticks, ticks)
        above.invert_yaxis()
        if not lengths:  # --no-scaling
            below.set_visible(False)
            continue
        for what in ("time_s", "bound_s"):
            below.plot([row["length"] for row in lengths], [row[what] * 1e3 for row in lengths], marker="o", label=what[:-2])
        below.set(xlabel=CASES[case]({}).grows[0], ylabel="ms", xscale="log", yscale="log")
        below.minorticks_off()
        below.set_xticks([row["length"] for row in lengths], [row["length"] for row in lengths])
        below.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def part(word: str) -> tuple[str, int]:
    name, value = word.split("=")
    return name, int(value)


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=CASES, help="default: all")
    parser.add_argument("--size", nargs="+", type=part, default=[], metavar="L=4096", help="where it is not the standard one")
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True, help="the tables over growing lengths")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, at least, for each time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # a contender's process
    args = parser.parse_args(words)
    args.size = dict(args.size)
    if args.size and (not args.name or args.size.keys() - CASES[args.name]({}).size):
        parser.error(f"--size goes with a name, and has parts of its size: {_words(CASES[args.name]({}).size) if args.name else 'none'}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def main(words: list[str] | None = None) -> None:
    args = arguments(words)
    if args.one:
        stay_within_memory()
        print(json.dumps(one(**args.one)))
        return
    machine = facts(("torch", "triton", *PEERS)) | {"not_measured": {peer: reason for peer in PEERS if (reason := why_not(peer))}}
    rates, rows = ceilings(args.seconds), []
    print(opening(machine, rates), flush=True)
    for case in [args.name] if args.name else CASES:
        rows += table(versus(case, args.size, args.seconds, rates))
        if args.scaling:
            rows += table(growing(case, args.size, args.seconds, rates))
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "ceilings": rates, "rows": rows}, indent=1), encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
