"""Sections of a language model's report: perplexity, agreement, caches, half-lives, scores and continuations."""

import math
import statistics
from collections.abc import Iterable, Iterator

from convert.core.console import size
from convert.reports import language_page
from convert.reports.markdown import block
from convert.reports.scores import markdown_table
from convert.reports.sections import Curve, Sections
from convert.runs.language_schemas import HalfLives, LanguageReport

HALF_LIFE_LINES = 8


def summary(report: LanguageReport) -> str:
    """Quality and cost in a few sentences."""
    ppl = report.perplexity
    return (
        f"Perplexity on held-out text {ppl.student:.3f}; the teacher's is {ppl.teacher:.3f} (ratio {ppl.ratio:.4f})."
        f" Their top-1 agreement on the next token is {report.agreement.top1:.2%}; KL {report.kl.mean_nats:.4f} nats"
        f" per token ({report.measured_tokens:,} tokens). {break_even(report)}"
    )


def comparison(report: LanguageReport) -> list[tuple[str, str, str, str]]:
    """Rows of the table at the end of a run: quantity, teacher, student, comparison."""
    ppl = report.perplexity
    rows = [
        ("perplexity", f"{ppl.teacher:.3f}", f"{ppl.student:.3f}", f"ratio {ppl.ratio:.4f}"),
        ("top-1 agreement", "", "", f"{report.agreement.top1:.2%}"),
        ("KL(teacher || student)", "", "", f"{report.kl.mean_nats:.4f} nats"),
    ]
    for length, teacher, student, is_measured in _caches(report):
        name = f"cache at {length:,} tokens" + ("" if is_measured else ", by formula")
        rows.append((name, size(teacher), size(student), f"{student / teacher:.3g} x"))
    return rows


def _caches(report: LanguageReport) -> Iterator[tuple[int, int, int, bool]]:
    """Context length, the teacher's and the student's cache in bytes, and whether they are measured (which agrees with
    the formula to the byte)."""
    cache = report.cache_bytes
    for length, teacher in cache.formula.teacher.items():
        if length in cache.teacher:
            yield int(length), cache.teacher[length], cache.student[length], True
        else:
            yield int(length), teacher, cache.formula.student[length], False


def break_even(report: LanguageReport) -> str:
    """The context length from which the student's cache is the smaller one, in a sentence."""
    length = report.cache_bytes.break_even_tokens
    if length is None:
        return "The student's cache is never the smaller one."
    if length <= 1:
        return "The student's cache is the smaller one at every length."
    return f"The student's cache is the smaller one beyond {length:,} tokens of context."


def half_life_lines(layers: HalfLives) -> list[str]:
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
    """The median, of an even number the lower one; None is for ever."""
    median = statistics.median_low(math.inf if value is None else value for value in values)
    return None if median == math.inf else median


def _tokens(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def tables(report: LanguageReport) -> list[str]:
    """Markdown of the table of caches."""
    rows = [
        "| context | teacher's cache, bytes | student's cache, bytes | | by formula, teacher | student |",
        "|---|---|---|---|---|---|",
    ]
    formula = report.cache_bytes.formula
    for length, teacher, student, is_measured in _caches(report):
        measured = f"{teacher:,} | {student:,}" if is_measured else "not measured | not measured"
        exact = f"{formula.teacher[str(length)]:,} | {formula.student[str(length)]:,}"
        rows.append(f"| {length:,} | {measured} | {student / teacher:.3g} x | {exact} |")
    return ["\n".join(rows) + "\n"]


def scores(report: LanguageReport) -> list[str]:
    """Markdown of the scores by task; nothing where there is no gap."""
    table = markdown_table(report.evaluation)
    return [table] if table else []


def texts(report: LanguageReport) -> list[str]:
    """Markdown of the continuations of both models."""
    if not report.continuations:
        return []
    parts = ["## Greedy continuations of held-out text\n"]
    for row in report.continuations:
        written = {"prompt": row.prompt, "teacher": row.teacher, "student": row.student}
        parts += [f"**{writer}**\n\n{block(text)}\n" for writer, text in written.items()]
    return parts


def usage(native: bool) -> tuple[str, str]:
    """The model card's pipeline_tag, and the code that loads the model."""
    trust = "" if native else ", trust_remote_code=True"
    return "text-generation", (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nmodel ="
        f" AutoModelForCausalLM.from_pretrained(FOLDER{trust})\ntokenizer ="
        f" AutoTokenizer.from_pretrained(FOLDER{trust})\n```\n\n"
    )


def numbers(report: LanguageReport) -> dict[str, float]:
    """What W&B's table of runs shows."""
    return {
        "perplexity_ratio": report.perplexity.ratio,
        "top1_agreement": report.agreement.top1,
        "kl_nats": report.kl.mean_nats,
    }


LANGUAGE = Sections[LanguageReport](
    summary=summary,
    lead=language_page.lead,
    comparison=comparison,
    remarks=lambda report: [break_even(report)],
    facts=lambda report: half_life_lines(report.half_lives),
    tables=tables,
    scores=scores,
    texts=texts,
    usage=usage,
    cards=language_page.cards,
    curves=(
        Curve("perplexity", "Held-out perplexity", log=True),
        Curve("generation", "Correct answers by generation", log=False),
    ),
    results=language_page.results,
    costs=language_page.costs,
    numbers=numbers,
)
