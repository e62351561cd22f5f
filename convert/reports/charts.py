"""Charts as SVG that follow the page's colours, light or dark. Names in them may be a stranger's: they come out as
text."""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from convert.core.console import count, short, size
from convert.core.files import write_text
from convert.runs.evaluation_schemas import Gap, tasks_of
from convert.runs.keys import SCORINGS, Scoring
from convert.runs.win_and_tie import TOLERANCE, Needed, rate

INK, MUTED = "#000001", "#000002"  # placeholders for variables of the page
SERIES = tuple(f"#0000{n}" for n in range(10, 18))
DARKEST = 0.55  # opacity of a cell of a heat map, through which its text stays readable
COLOURS = """\
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #22252a; --muted: #85888f; --line: #e3e0d8; --mark: #ffe08a;
  --c0: #1f6fb2; --c1: #c8571b; --c2: #2a8c55; --c3: #8a4fb0;
  --c4: #b03a5b; --c5: #7a6a1f; --c6: #3c8c93; --c7: #5a5f69; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --card: #1d2024; --ink: #e6e4df; --muted: #8d9098; --line: #33373d; --mark: #6a5410;
    --c0: #6db3f2; --c1: #f2975f; --c2: #6fcf97; --c3: #c79be8;
    --c4: #f08aa8; --c5: #d8c56a; --c6: #7fd0d8; --c7: #a9adb6; } }"""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "legend.frameon": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "text.parse_math": False,
}
Line = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def _figure(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as SVG without a size of its own; ids are the chart's own, colours the page's. matplotlib escapes the
    text in it, this function the name."""
    out, own = io.StringIO(), f"c{hashlib.sha256(name.encode(errors='backslashreplace')).hexdigest()[:8]}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has others
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\1{own}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'(<svg[^>]*?) height="[^"]*"',
        lambda found: f'{found[1]} role="img" aria-label="{escape(short(name))}"',
        text,
        count=1,
    )
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), *((c, f"c{n}") for n, c in enumerate(SERIES))):
        text = text.replace(f": {colour}", f": var(--{variable})")
    return Markup(text)


def _legend(home: Axes | Figure, labels: Sequence[str], **settings: Any) -> None:
    """Add a legend of everything that was plotted with a number as its label: matplotlib leaves out labels that begin
    with _."""
    legend = home.legend(**settings)
    for text in legend.get_texts():
        text.set_text(short(labels[int(text.get_text())], 40))


def curves(
    name: str, lines: Sequence[Line], ylabel: str, *, log: bool = False, zero: bool = False, unit: str = "tokens"
) -> Markup:
    """Lines over the tokens of a run, or whatever its training counts; the y axis is logarithmic with `log`, and begins
    at 0 with `zero`."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (_, x, y) in enumerate(lines):
            axes.plot(
                x,
                y,
                color=SERIES[number % len(SERIES)],
                label=number,
                marker="o" if len(x) < 12 else None,
                markersize=4,
            )
        axes.set(xlabel=short(unit), ylabel=ylabel, yscale="log" if log else "linear")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if zero:
            axes.set_ylim(bottom=0)
        if len(lines) > 1:
            _legend(axes, [label for label, _, _ in lines], fontsize=8)
        return _svg(figure, name)


def gaps(name: str, rows: Sequence[Gap]) -> Markup:
    """The gap of each task by each scoring method, with its interval."""
    tasks = tasks_of(rows)
    with rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.36 * len(tasks))
        for number, scoring in enumerate(SCORINGS):
            some = {row.task: row for row in rows if row.scoring == scoring}
            at = [place + (0.14 if number else -0.14) for place in range(len(tasks))]
            middle = [100 * some[task].gap for task in tasks]
            spread = [
                [100 * (some[task].gap - some[task].low) for task in tasks],
                [100 * (some[task].high - some[task].gap) for task in tasks],
            ]
            axes.errorbar(
                middle,
                at,
                xerr=spread,
                fmt="o" if number == 0 else "s",
                color=SERIES[number],
                label=f"by {scoring}",
                markersize=5,
                linewidth=1.2,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(
            xlabel="points behind the teacher (95 %)",
            yticks=range(len(tasks)),
            yticklabels=[short(task, 30) for task in tasks],
        )
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
        return _svg(figure, name)


def win_and_tie(name: str, needed: Mapping[Scoring, Sequence[Needed]]) -> Markup:
    """The win-and-tie rate over the tolerance by each scoring method. The area around a line is between the rates at
    the ends of the gaps' intervals; the headline's tolerance is marked."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (scoring, tasks) in enumerate(needed.items()):
            ends = {key: [getattr(task, key) for task in tasks] for key in ("value", "low", "high")}
            x = sorted({0.0, 1.0, *(value for values in ends.values() for value in values)})
            y = {key: [rate(values, tolerance) for tolerance in x] for key, values in ends.items()}
            colour = SERIES[number]
            axes.fill_between(x, y["high"], y["low"], step="post", color=colour, alpha=0.12, linewidth=0)
            axes.step(x, y["value"], where="post", color=colour, label=f"by {scoring}")
        axes.axvline(TOLERANCE, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="tolerance, share of the teacher's score", ylabel="tasks won or tied")
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.03))
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
        return _svg(figure, name)


def by_context(name: str, lines: Sequence[Line], ylabel: str, *, in_bytes: bool = False) -> Markup:
    """Lines over the length of the context, both axes logarithmic."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (_, x, y) in enumerate(lines):
            axes.plot(x, y, color=SERIES[number % len(SERIES)], label=number, marker="o", markersize=4)
        axes.set(xlabel="tokens of context", ylabel=ylabel, xscale="log", yscale="log")
        lengths = sorted({length for _, x, _ in lines for length in x})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        if not in_bytes:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if in_bytes else f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _legend(axes, [label for label, _, _ in lines], fontsize=8)
        return _svg(figure, name)


def quality(name: str, points: Sequence[tuple[str, float, float]], length: int) -> Markup:
    """Perplexity over cache size at this context length: points (label, bytes, perplexity)."""
    with rc_context(STYLE):
        figure, axes = _figure()
        for number, (_, x, y) in enumerate(points):
            axes.plot([x], [y], "o", color=SERIES[number % len(SERIES)], label=number, markersize=7)
        axes.set(xlabel=f"cache at {length:,} tokens", ylabel="perplexity, held-out text")
        axes.set_xlim(0, 1.15 * max(x for _, x, _ in points))
        axes.margins(y=0.25)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value) if value else "0"))
        _legend(axes, [label for label, _, _ in points], fontsize=8)
        return _svg(figure, name)


def gaps_by_scoring(name: str, points: Sequence[tuple[str, float, float]]) -> Markup:
    """Students by their gap by likelihood (x) and by generation (y), in points; above the diagonal likelihood
    flatters."""
    with rc_context(STYLE):
        figure, axes = _figure(3.6)
        ends = [min(0.0, *(v for _, *xy in points for v in xy)) - 2, max(v for _, *xy in points for v in xy) + 2]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        for number, (_, x, y) in enumerate(points):
            axes.plot(
                [x],
                [y],
                "os^Dv"[number // len(SERIES) % 5],
                color=SERIES[number % len(SERIES)],
                label=number,
                markersize=6,
            )
        axes.set(xlabel="points behind by likelihood", ylabel="points behind by generation", xlim=ends, ylim=ends)
        _legend(figure, [label for label, _, _ in points], loc="outside lower center", ncols=2, fontsize=7)
        return _svg(figure, name)


def heat_map(
    name: str,
    values: Sequence[Sequence[float]],
    cells: Sequence[Sequence[str]],
    ylabels: Sequence[str],
    xlabels: Sequence[str],
    ylabel: str,
    xlabel: str,
) -> Markup:
    """A matrix as cells that are the darker the nearer their values are to 1, with the texts `cells` in them."""
    rows, columns = len(values), len(values[0])
    with rc_context(STYLE):
        figure, axes = _figure(min(7.0, max(2.2, 0.9 + 4.0 * rows / max(columns, 5))))
        size = max(3.0, min(8.0, 68 / columns))
        for y, (numbers, texts) in enumerate(zip(values, cells, strict=True)):
            for x, (value, text) in enumerate(zip(numbers, texts, strict=True)):
                if (strength := DARKEST * min(1.0, max(0.0, value))) > 0:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=strength))
                axes.text(x, y, text, ha="center", va="center", fontsize=size)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
        names = [short(label, 14) for label in xlabels]
        turned = 90 if max(map(len, names)) * columns > 50 else 0
        axes.set_xticks(range(columns), names, rotation=turned)
        axes.set_yticks(range(rows), [short(label, 14) for label in ylabels])
        axes.tick_params(length=0, labelsize=max(5.0, min(8.0, 130 / max(rows, columns))))
        axes.grid(visible=False)
        return _svg(figure, name)


def write(svg: Markup, file: Path) -> None:
    """Write a chart as a file of its own, whose colours follow the reader's light or dark."""
    write_text(file, str(svg).replace(">", f"><style>{COLOURS} svg {{ background: var(--paper); }}</style>", 1))
