"""Times, memory and errors of the kernels, beside every peer that is installed.

    python -m kernels.bench                               # all operators at their standard sizes
    python -m kernels.bench selective_scan --scaling      # one of them, over growing lengths
    python -m kernels.bench --json bench.json --plot bench.png

Every contender runs in a process of its own, one after another; its result is compared with float64 first, and a wrong one
gets no time. Ceilings (copy, float32 matrix product) are measured in the same call.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from kernels.contenders import OPERATORS, Work

WRONG = 1e-3  # relative RMS error from which a result is called wrong


def peak_of(run) -> int:
    """Highest resident (or device) memory while it runs, above that before, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = highest = _resident()
    watching = True

    def watch():
        nonlocal highest
        while watching:
            highest = max(highest, _resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    watching = False
    thread.join()
    return highest - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def seconds(run) -> tuple[float, float]:
    """Median, and half the distance between the quartiles."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        low, middle, high = do_bench(run, quantiles=(0.25, 0.5, 0.75))
        return middle / 1e3, (high - low) / 2e3
    times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=1.0).times
    times += [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()).timeit(1).mean] * (len(times) < 2)
    quartiles = statistics.quantiles(times, n=4)
    return statistics.median(times), (quartiles[2] - quartiles[0]) / 2


def error(found, exact) -> float:
    """The largest relative RMS error among outputs and gradients."""
    return max(
        ((f.double() - e).square().mean() / e.square().mean().clamp(min=1e-30)).sqrt().item() for f, e in zip(found, exact, strict=True)
    )


def one(operator: str, contender: str, size: dict) -> dict:
    """Of one contender, in this process."""
    work: Work = OPERATORS[operator](size)
    run = work.contenders[contender]
    arguments = work.make(torch.float32)
    row = {"operator": operator, "contender": contender, "size": size, "bytes": work.bytes, "operations": work.operations}
    row["peak_bytes"] = peak_of(lambda: work.both(run, arguments))
    row["error"] = error(work.both(run, arguments), work.both(work.exact, work.make(torch.float64)))
    if not row["error"] < WRONG:
        return row
    row["both_s"], row["both_spread"] = seconds(lambda: work.both(run, arguments))
    with torch.no_grad():
        row["forward_s"], row["forward_spread"] = seconds(lambda: run(arguments))
    return row


def ceilings() -> dict:
    """GB/s of a copy (read and written) and GFLOP/s of a float32 matrix product, on this machine now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.rand(1 << 26, device=device), torch.rand(1 << 26, device=device)
    m = torch.rand(2048, 2048, device=device)
    copy, product = seconds(lambda: a.copy_(b))[0], seconds(lambda: m @ m)[0]
    return {"copy_GB_s": 2 * a.nbytes / copy / 1e9, "matmul_GFLOP_s": 2 * 2048**3 / product / 1e9, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", nargs="*", choices=[*OPERATORS, []], help="default: all")
    parser.add_argument("--scaling", action="store_true", help="over growing lengths, ours only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.operator[0], args.one[0], json.loads(args.one[1]))))
        return
    found = {"ceilings": ceilings(), "rows": []}
    print("copy {copy_GB_s:.1f} GB/s · float32 product {matmul_GFLOP_s:.0f} GFLOP/s · {threads} threads".format(**found["ceilings"]))
    for operator in args.operator or OPERATORS:
        work = OPERATORS[operator]({})
        for size in work.scaling if args.scaling else [work.size]:
            print(f"\n{operator} {' '.join(f'{k}={v}' for k, v in size.items())}")
            print(f"{'':24}{'forward':>14}{'both':>18}{'ratio':>8}{'GB/s':>8}{'GFLOP/s':>9}{'extra memory':>14}{'error':>10}")
            ours = None
            for contender in list(work.contenders)[: 1 if args.scaling else None]:
                row = _in_a_process(operator, contender, size)
                found["rows"].append(row)
                ours = ours or row
                print(_line(row, ours))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot:
        _plot(found["rows"], args.plot)


def _in_a_process(operator: str, contender: str, size: dict) -> dict:
    command = [sys.executable, "-m", "kernels.bench", operator, "--one", contender, json.dumps(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"operator": operator, "contender": contender, "size": size, "failed": reason}
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict, ours: dict) -> str:
    name = f"  {row['contender']:22}"
    if "failed" in row:
        return f"{name}failed: {row['failed']}"
    if "both_s" not in row:
        return f"{name}WRONG: relative error {row['error']:.1e}, so no time"
    both = row["both_s"]
    return (
        f"{name}{row['forward_s'] * 1e3:11.2f} ms{both * 1e3:11.2f} ±{row['both_spread'] * 1e3:4.1f}{both / ours.get('both_s', both):8.2f}"
        f"{row['bytes'] / both / 1e9:8.1f}{row['operations'] / both / 1e9:9.1f}{row['peak_bytes'] / 1e6:11.1f} MB{row['error']:10.1e}"
    )


def _plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "both_s" in row]
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    figure, axes = pyplot.subplots(1, len(operators), figsize=(5 * len(operators), 3.5), squeeze=False)
    for axis, operator in zip(axes[0], operators, strict=True):
        some = [row for row in rows if row["operator"] == operator]
        labels = [f"{row['contender']} L={row['size'].get('L', 1)}" for row in some]
        axis.barh(labels, [row["both_s"] * 1e3 for row in some], xerr=[row["both_spread"] * 1e3 for row in some])
        axis.set(title=operator, xlabel="ms, forward and backward", xscale="log")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
