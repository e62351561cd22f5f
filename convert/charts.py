"""Charts as SVG that follows the page's colours, light or dark."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from convert.console import count, size

INK, MUTED = "#000001", "#000002"  # stand for variables of the page
SERIES = tuple(f"#0000{n}" for n in range(10, 18))
COLOURS = """\
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #fff; --ink: #22252a; --muted: #85888f; --line: #e3e0d8; --mark: #ffe08a;
  --c0: #1f6fb2; --c1: #c8571b; --c2: #2a8c55; --c3: #8a4fb0; --c4: #b03a5b; --c5: #7a6a1f; --c6: #3c8c93; --c7: #5a5f69; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --card: #1d2024; --ink: #e6e4df; --muted: #8d9098; --line: #33373d; --mark: #6a5410;
    --c0: #6db3f2; --c1: #f2975f; --c2: #6fcf97; --c3: #c79be8; --c4: #f08aa8; --c5: #d8c56a; --c6: #7fd0d8; --c7: #a9adb6; } }"""
STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "grid.color": MUTED, "grid.alpha": 0.25,
    "axes.grid": True, "legend.frameon": False, "axes.axisbelow": True, "lines.linewidth": 1.6,
}  # fmt: skip
Curve = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def _figure(height: float = 2.9):
    figure = Figure(figsize=(4.6, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """Without a size of its own; ids are the chart's own, colours the page's."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{name}"', text, count=1)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), *((c, f"c{n}") for n, c in enumerate(SERIES))):
        text = text.replace(colour, f"var(--{variable})")
    return text


def curves(name: str, lines: Sequence[Curve], ylabel: str, *, log: bool = False, zero: bool = False) -> str:
    """Over the tokens of a run."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (label, x, y) in enumerate(lines):
            axes.plot(x, y, color=SERIES[number % len(SERIES)], label=label, marker="o" if len(x) < 12 else None, markersize=4)
        axes.set(xlabel="tokens", ylabel=ylabel, yscale="log" if log else "linear")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            axes.legend(fontsize=8)
        return _svg(figure, name)


def gaps(name: str, rows: Sequence[dict]) -> str:
    """Per task the gap by likelihood and by generation, with their intervals; rows of `evaluation.json`."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.36 * len(tasks))
        for number, (reading, label) in enumerate((("generation", "when it writes"), ("likelihood", "when it ranks"))):
            some = {row["task"]: row for row in rows if row["reading"] == reading}
            at = [place + (0.14 if number else -0.14) for place in range(len(tasks))]
            middle = [100 * some[task]["gap"] for task in tasks]
            spread = [
                [100 * (some[task]["gap"] - some[task]["low"]) for task in tasks],
                [100 * (some[task]["high"] - some[task]["gap"]) for task in tasks],
            ]
            axes.errorbar(
                middle, at, xerr=spread, fmt="o" if number == 0 else "s", color=SERIES[number], label=label, markersize=5, linewidth=1.2
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="points behind the teacher (95 %)", yticks=range(len(tasks)), yticklabels=tasks)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
        return _svg(figure, name)


def by_context(name: str, lines: Sequence[Curve], ylabel: str, *, in_bytes: bool = False) -> str:
    """Over the length of the context, both axes logarithmic."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (label, x, y) in enumerate(lines):
            axes.plot(x, y, color=SERIES[number % len(SERIES)], label=label, marker="o", markersize=4)
        axes.set(xlabel="tokens of context", ylabel=ylabel, xscale="log", yscale="log")
        lengths = sorted({length for _, x, _ in lines for length in x})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if not in_bytes:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if in_bytes else f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
        return _svg(figure, name)


def quality(name: str, points: Sequence[tuple[str, float, float]], length: int) -> str:
    """Perplexity over cache bytes: (label, bytes, perplexity); further down and to the left is better."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (label, x, y) in enumerate(points):
            axes.plot([x], [y], "o", color=SERIES[number % len(SERIES)], label=label, markersize=7)
        axes.set(xlabel=f"cache at {length:,} tokens", ylabel="perplexity, held-out text")
        axes.set_xlim(0, 1.15 * max(x for _, x, _ in points))
        axes.margins(y=0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))
        axes.legend(fontsize=8)
        return _svg(figure, name)


def readings(name: str, points: Sequence[tuple[str, float, float]]) -> str:
    """Students by their gap when they rank (x) and when they write (y), in points; above the diagonal likelihood flatters."""
    with rc_context(STYLE):
        figure, axes = _figure(3.6)
        ends = [min(0.0, *(v for _, *xy in points for v in xy)) - 2, max(v for _, *xy in points for v in xy) + 2]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        for number, (label, x, y) in enumerate(points):
            axes.plot([x], [y], "os^Dv"[number // len(SERIES)], color=SERIES[number % len(SERIES)], label=label, markersize=6)
        axes.set(xlabel="points behind when it ranks", ylabel="points behind when it writes", xlim=ends, ylim=ends)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)
        return _svg(figure, name)


def write(svg: str, file: Path) -> None:
    """A chart as a file of its own, whose colours follow the reader's light or dark."""
    file.write_text(svg.replace(">", f"><style>{COLOURS} svg {{ background: var(--paper); }}</style>", 1), encoding="utf-8")
