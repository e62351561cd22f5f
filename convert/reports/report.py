"""The report that a person reads, and the model card, from the numbers of a run."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table

from convert.core.console import Console, count, duration, size, visible

HALF_LIFE_LINES = 8


def show(report: dict, console: Console) -> None:
    """The table at the end of a run."""
    table = Table(title=f"{report['teacher']} -> {report['target']}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("held-out text", "teacher", "student", ""):
        table.add_column(column, justify="left" if column == "held-out text" else "right")
    ppl = report["perplexity"]
    table.add_row("perplexity", f"{ppl['teacher']:.3f}", f"{ppl['student']:.3f}", f"ratio {ppl['ratio']:.4f}")
    table.add_row("same first token", "", "", f"{report['agreement']['top1']:.2%}")
    table.add_row("KL(teacher || student)", "", "", f"{report['kl']['mean_nats']:.4f} nats")
    for length, teacher, student, how in _caches(report):
        table.add_row(f"cache at {length:,} tokens{how}", size(teacher), size(student), f"{student / teacher:.3g} x")
    console.print(table, soft_wrap=False)
    console.print(_break_even(report))
    stages = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "tokens", "time", "first loss", "last loss", "perplexity after"):
        stages.add_column(column, justify="left" if column == "step" else "right")
    for row in report["steps"]:
        trained = (
            [count(row["tokens"]), duration(row["seconds"]), f"{row['loss_first']:.4f}", f"{row['loss_last']:.4f}"]
            if row["tokens"]
            else [""] * 4
        )
        stages.add_row(row["name"], *trained, f"{row['perplexity_after']:.3f}")
    console.print(stages, soft_wrap=False)
    for line in facts(report):
        console.print(line)


def _caches(report: dict) -> Iterator[tuple[int, int, int, str]]:
    """Length, the teacher's and the student's cache, and whether that is measured (which agrees with the formula to the
    byte)."""
    cache = report["cache_bytes"]
    for length, teacher in cache["formula"]["teacher"].items():
        if length in cache["teacher"]:
            yield int(length), cache["teacher"][length], cache["student"][length], ""
        else:
            yield int(length), teacher, cache["formula"]["student"][length], ", by formula"


def _break_even(report: dict) -> str:
    where = report["cache_bytes"]["break_even_tokens"]
    if where is None:
        return "The student's cache is never the smaller one."
    if where <= 1:
        return "The student's cache is the smaller one at every length."
    return f"The student's cache is the smaller one beyond {where:,} tokens of context."


def facts(report: dict) -> list[str]:
    """What a run has to say beside its tables, a sentence each."""
    lines = []
    if (handover := report["handover"])["max_abs_logit"] is not None:
        lines.append(
            f"Hand-over over {handover['tokens']:,} tokens: logits moved by at most {handover['max_abs_logit']:.2g}"
            f" (allowed {handover['allowed']:.2g}), perplexity by {handover['perplexity_change']:.1e} of itself."
            + (
                f" That is float32's rounding: in float64 they move by {handover['max_abs_logit_float64']:.2g}."
                if "max_abs_logit_float64" in handover
                else ""
            )
        )
    lines += _kept(report["layers"])
    lines += _half_lives(report["half_lives"])
    for row in report["stages"]:
        if row["skipped"]:
            lines.append(f"Step {row['name']}: {row['skipped']} steps had no finite gradient and were skipped.")
    lines += _native(report.get("export", {}).get("native"))
    lines.append(
        f"{count(report['tokens']['total'])} tokens in {duration(report['seconds']['total'])}; seed {report['seed']};"
        " export checked in a clean process."
    )
    return lines


def _native(native: dict | None) -> list[str]:
    """Known when the export is done; the model card is written before."""
    if native is None:
        return []
    if "obstacle" in native:
        return [
            f"No architecture of transformers is this student ({native['obstacle']}): model/ brings its code along."
        ]
    return [
        f"native/ is the same student as a {native['model_type']}, without code of ours: in a clean process its logits"
        f" differ by at most {native['max_abs_logit']:.2g} (allowed {native['allowed']:.2g})."
    ]


def _kept(layers: dict) -> list[str]:
    if not layers["kept"]:
        return []
    kept = ", ".join(map(str, layers["kept"]))
    if "kl_when_edited_alone" not in layers:
        return [f"Layers that keep their attention: {kept}."]
    ranking = sorted(enumerate(layers["kl_when_edited_alone"]), key=lambda row: -row[1])
    costs = ", ".join(f"{layer} ({kl:.2g})" for layer, kl in ranking)
    return [
        f"Layers that keep their attention, because they cost most when edited alone: {kept}. KL of each in nats:"
        f" {costs}."
    ]


def _half_lives(layers: dict) -> list[str]:
    """A line for each layer, or for each group of neighbours where that would be too many: report.json has all of
    them."""
    names, lines = list(layers), []
    together = math.ceil(len(names) / HALF_LIFE_LINES)
    for group in (names[i : i + together] for i in range(0, len(names), together or 1)):
        where = f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]} to {group[-1]} (medians)"
        quantiles = ", ".join(
            f"{float(q):.0%} {_tokens(_median(layers[name][q] for name in group))}" for q in layers[group[0]]
        )
        lines.append(f"Half-lives in {where}: {quantiles} tokens.")
    return lines


def _median(values: Iterable[float | None]) -> float | None:
    """The lower one of an even number; None is for ever."""
    median = statistics.median_low(math.inf if value is None else value for value in values)
    return None if median == math.inf else median


def _tokens(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _escaped(found):
    """All texts in it as Markdown that shows them as they are: no markup, HTML, link or further line comes of a
    name."""
    if isinstance(found, dict):
        return {key: _escaped(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_escaped(value) for value in found]
    if not isinstance(found, str):
        return found
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(found))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")


def _code(text: str) -> str:
    """In a line, between more backticks than it holds in a row."""
    text = visible(text)
    fence = "`" * (_most_backticks(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text or ' '}`"


def _block(text: str) -> str:
    fence = "`" * max(3, _most_backticks(text) + 1)
    return f"{fence}\n{visible(text, keep=chr(10) + chr(9))}\n{fence}"


def _most_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def markdown(report: dict) -> str:
    """report.md; its first half is the model card."""
    written, settings, report = report["continuations"], report["settings"], _escaped(report)
    ppl, parts = report["perplexity"], []
    parts.append(f"# {report['teacher']} converted to {report['target']}\n")
    parts.append(
        f"Perplexity on held-out text {ppl['student']:.3f}; the teacher's is {ppl['teacher']:.3f} (ratio"
        f" {ppl['ratio']:.4f}). The two agree on the first token at {report['agreement']['top1']:.2%} of the positions;"
        f" KL {report['kl']['mean_nats']:.4f} nats per token ({report['measured_tokens']:,} tokens)."
        f" {_break_even(report)}\n"
    )
    rows = ["| step | tokens | time | first loss | last loss | perplexity after |", "|---|---|---|---|---|---|"]
    for row in report["steps"]:
        trained = (
            f"{row['tokens']:,} | {duration(row['seconds'])} | {row['loss_first']:.4f} | {row['loss_last']:.4f}"
            if row["tokens"]
            else " | | | "
        )
        rows.append(f"| {row['name']} | {trained} | {row['perplexity_after']:.3f} |")
    parts.append("\n".join(rows) + "\n")
    rows = [
        "| context | teacher's cache, bytes | student's cache, bytes | | by formula, teacher | student |",
        "|---|---|---|---|---|---|",
    ]
    formula = report["cache_bytes"]["formula"]
    for length, teacher, student, how in _caches(report):
        measured = "not measured | not measured" if how else f"{teacher:,} | {student:,}"
        exact = f"{formula['teacher'][str(length)]:,} | {formula['student'][str(length)]:,}"
        rows.append(f"| {length:,} | {measured} | {student / teacher:.3g} x | {exact} |")
    parts.append("\n".join(rows) + "\n")
    parts.append("\n".join(f"* {line}" for line in facts(report)) + "\n")
    parts += _answers(report["evaluation"])
    if written:
        parts.append("## Greedy continuations of held-out text\n")
        parts += [f"**{who}**\n\n{_block(row[who])}\n" for row in written for who in ("prompt", "teacher", "student")]
    versions = ", ".join(f"{_escaped(name)} {version}" for name, version in report["versions"].items() if version)
    parts.append(
        f"## Provenance\n\nTeacher {_code(settings['teacher'])}; data {_code(settings['data'])} (fingerprint"
        f" {_code(settings['data_fingerprint'])}); seed {report['seed']}; {versions}; commit"
        f" {report['commit'] or 'unknown'}. Every setting is in `report.json`.\n"
    )
    return "\n".join(parts)


def _answers(found: dict) -> list[str]:
    """What both answered, by what they write and by what they rank first."""
    rows = {(row["task"], row["reading"], row["model"]): row for row in found["rows"]}
    gaps = {(row["task"], row["reading"]): row for row in found["gaps"]}
    if not gaps:
        return []
    lines = [
        (
            "| questions | teacher writes | student writes | gap, 95 % | teacher ranks | student ranks | gap, 95 % |"
            " student unparsable | n |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(task for task, _ in gaps):
        cells = []
        for reading in ("generation", "likelihood"):
            gap = gaps[task, reading]
            cells += [f"{rows[task, reading, who]['score']:.1%}" for who in ("teacher", "student")]
            cells.append(f"{100 * gap['gap']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]")
        written = rows[task, "generation", "student"]
        lines.append(f"| {task} | {' | '.join(cells)} | {written['unparsable']:.0%} | {written['n']} |")
    return ["## Questions answered rightly\n", "\n".join(lines) + "\n"]


def card(report: dict, native: bool = False) -> str:
    """The model card of the export: how to load it, then the report. A native one brings no code."""
    trust = "" if native else ", trust_remote_code=True"
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    usage = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel ="
        f" AutoModelForCausalLM.from_pretrained(FOLDER{trust})\ntokenizer ="
        f" AutoTokenizer.from_pretrained(FOLDER{trust})\n```\n\n"
    )
    title, _, rest = markdown(report).partition("\n")
    return f"{head}{title}\n\n{usage}{rest}"
