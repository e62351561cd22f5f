"""Tables and figure of `kernels.bench`."""

from collections.abc import Iterator
from pathlib import Path

PHASES = ("forward", "backward", "both")
LEGEND = """times: median ± half the distance between the quartiles; backward alone runs on a kept graph
ratio: to ours at the same size, or at growing sizes to the standard one; the second ratio is of memory
bound: the time over the least that the definition's bytes (at the rate of a copy) or exponentials take on this machine
GB/s, GFLOP/s: what forward and backward need by the definition, counted once; behind them the share of a copy,
of a product · memory: the most that forward and backward take above their inputs
error: the largest relative RMS error of results and gradients"""
COLUMNS = (
    ("forward", 15),
    ("backward", 15),
    ("both", 15),
    ("ratio", 7),
    ("bound", 7),
    ("GB/s", 7),
    ("copy", 6),
    ("GFLOP/s", 8),
    ("prod.", 7),
    ("memory", 9),
    ("ratio", 7),
    ("error", 9),
)


def format_opening(machine: dict, rates: dict[str, float]) -> str:
    """Format the lines above all tables: the machine, its ceilings, what is not measured, and the legend."""
    versions = " ".join(f"{package} {version}" for package, version in machine["versions"].items())
    missing = ", ".join(f"{baseline} ({reason})" for baseline, reason in machine["not_measured"].items())
    return (
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads · {versions}\n"
        f"copy {rates['copy_GB_s']:.1f} GB/s · float32 product {rates['product_GFLOP_s']:.0f} GFLOP/s"
        f" · exponentials {rates['exponentials_G_s']:.2f} G/s\nnot measured: {missing or 'none'}\n\n{LEGEND}"
    )


def print_table(rows: Iterator[dict]) -> list[dict]:
    """Print each row as soon as it is measured, and the notes at the end; return all rows."""
    done: list[dict] = []
    for row in rows:
        if not done:
            print(format_heading(row))
        done.append(row)
        print(format_row(row, _unit(done[0])[1]), flush=True)
    for note in dict.fromkeys(note for row in done for note in _notes(row)):
        print(note)
    return done


def format_heading(row: dict) -> str:
    """Format the heading of the table whose first row is this one."""
    unit, scale = _unit(row)
    title = f"{row['case']}, ours at growing sizes, float32"
    if row["table"] == "baselines":
        title = f"{row['case']}, ours and baselines · {format_size(row['size'])}, float32"
        if "bound_s" in row:
            title += f" · bound {_number(row['bound_s'] * scale)} {unit}, set by {row['bound_by']}"
    return f"\n{title}\n{unit + ', MB':23}{''.join(f'{name:>{width}}' for name, width in COLUMNS)}"


def format_row(row: dict, scale: float) -> str:
    """Format one row, with times in 1 / scale seconds; a wrong result has none."""
    name = f"{row['label']:23}"
    if "failed" in row:
        return f"{name}failed: {row['failed'][:110]}"
    if "time_s" not in row:
        return f"{name}WRONG, so no time: relative error {row['error']:.1e}"
    times = [_time_cell(row, phase, scale) for phase in PHASES]
    time_ratio, peak_ratio = (_number(row[k]) if row.get(k) is not None else "-" for k in ("time_ratio", "peak_ratio"))
    cells = [
        *times,
        time_ratio,
        _number(row["bound_ratio"]),
        _number(row["GB_s"]),
        f"{row['of_copy']:.0%}",
        f"{row['GFLOP_s']:.1f}",
        f"{row['of_product']:.1%}",
        f"{row['peak_bytes'] / 1e6:.1f}",
        peak_ratio,
        f"{row['error']:.1e}",
    ]
    return name + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def format_size(size: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in size.items())


def _time_cell(row: dict, phase: str, scale: float) -> str:
    if f"{phase}_s" not in row:
        return "-"
    return f"{_number(row[f'{phase}_s'] * scale)} ±{_number(row[f'{phase}_spread_s'] * scale)}"


def _unit(row: dict) -> tuple[str, float]:
    return ("ms", 1e3) if row.get("time_s", 1) > 1e-3 else ("µs", 1e6)


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.0f}"


def _notes(row: dict) -> list[str]:
    smaller = {k: v for k, v in row.get("check_size", {}).items() if v < row["size"][k]}
    return [f"errors are measured at {format_size(smaller)} at most"] * bool(smaller) + row.get("dispatch", [])


def plot(rows: list[dict], scaled: dict[str, str], file: Path) -> None:
    """Draw bars of ours and the baselines, and lines of ours over growing lengths.

    Args:
        scaled: case -> the name of the size that its scaling table varies.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "time_s" in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(2, len(cases), figsize=(5 * len(cases), 6), squeeze=False)
    for (above, below), case in zip(axes.T, cases, strict=True):
        bars, lengths = (
            [row for row in rows if row["case"] == case and row["table"] == table] for table in ("baselines", "scaling")
        )
        above.barh([row["label"] for row in bars], [row.get("time_ratio", 0) for row in bars])
        above.set(title=case, xlabel="time, ours = 1", xscale="log", xlim=(0.5, None))
        highest = max([row.get("time_ratio", 0) for row in bars], default=1)
        ticks = [n * 10**e for e in range(6) for n in (1, 3) if n * 10**e <= max(highest, 3)]
        above.minorticks_off()
        above.set_xticks(ticks, ticks)
        above.invert_yaxis()
        if not lengths:  # --no-scaling
            below.set_visible(False)
            continue
        values = [row["length"] for row in lengths]
        for key in ("time_s", "bound_s"):
            below.plot(values, [row[key] * 1e3 for row in lengths], marker="o", label=key.removesuffix("_s"))
        below.set(xlabel=scaled[case], ylabel="ms", xscale="log", yscale="log")
        below.minorticks_off()
        below.set_xticks(values, values)
        below.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
