"""The table of a grid of runs: both scoring methods side by side, pairs whose order flips between them, and what
intervals say of findings."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from convert.core.console import Console, count
from convert.evaluation.pairs import Correct, Interval, difference, interval_of, table_of
from convert.runs.evaluation_schemas import Evaluation, tasks_of
from convert.runs.keys import SCORINGS, Scoring

DEFAULT = "default"
SEEN = 0.1  # of the examples the teacher must have correct by generation, or no gap can be seen (ours)
COLUMNS = (
    "row", "axis", "change", "tokens", "seeds", "perplexity ratio", "cache at 8,192", "by likelihood",
    "against the default", "by generation", "against the default", "of the teacher's", "flips with rows",
)  # fmt: skip
# a finding, the row without it, and what the default has that the row has not
Findings = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Result:
    """What one run of one row found: `ratio` of perplexities, `cache` of the student's bytes to the teacher's at 8,192
    tokens, and what its student answered example by example."""

    axis: str
    name: str
    seed: int
    tokens: int
    ratio: float
    cache: float
    correct: Correct
    evaluation: Evaluation


@dataclass(frozen=True)
class Flip:
    """A pair of rows of one axis, the better one by likelihood first, that generation puts in the other order. The
    intervals are of the first minus the second."""

    axis: str
    better: str
    worse: str
    likelihood: Interval
    generation: Interval

    @property
    def is_sure(self) -> bool:
        """Whether neither interval holds zero."""
        return self.likelihood.sign > 0 > self.generation.sign


def by_row(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Row -> seed -> result: the default first, then axis by axis."""
    axes = list(dict.fromkeys(["", *(result.axis for result in results)]))
    rows: dict[str, dict[int, Result]] = {}
    for result in sorted(results, key=lambda result: axes.index(result.axis)):
        rows.setdefault(result.name, {})[result.seed] = result
    return rows


def tasks_seen(evaluation: Evaluation) -> list[str]:
    """The tasks of which the teacher has enough correct by generation."""
    return [t for t in tasks_of(evaluation.rows) if evaluation.row(t, "teacher", "generation").score >= SEEN]


def versus(a: dict[int, Result], b: dict[int, Result], scoring: Scoring) -> Interval | None:
    """Score of row a minus score of row b over the seeds and tasks that both have; None where there are none."""
    seeds = sorted(a.keys() & b.keys())
    evaluations = [row[seed].evaluation for row in (a, b) for seed in seeds]
    tasks = [t for t in tasks_seen(evaluations[0]) if all(t in tasks_of(e.rows) for e in evaluations)] if seeds else []
    if not tasks:
        return None
    tables = (table_of([row[seed].correct for seed in seeds], scoring, tasks) for row in (a, b))
    return difference(*tables)


def flips(results: Sequence[Result]) -> list[Flip]:
    """The pairs within an axis, the default included, whose order by likelihood is not that by generation."""
    rows, found = by_row(results), []
    for axis in dict.fromkeys(result.axis for result in results if result.axis):
        names = [name for name, row in rows.items() if next(iter(row.values())).axis in ("", axis)]
        for a, b in itertools.combinations(names, 2):
            ranked, written = (versus(rows[a], rows[b], scoring) for scoring in ("likelihood", "generation"))
            if ranked is None or written is None or ranked.mean * written.mean >= 0:
                continue
            forward = Flip(axis, a, b, ranked, written)
            found.append(forward if ranked.mean > 0 else Flip(axis, b, a, -ranked, -written))
    return found


def table_rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of the table, without its head."""
    rows, turned, lines = by_row(results), flips(results), []
    numbers = {name: str(number) for number, name in enumerate(rows, 1)}
    for name, row in rows.items():
        first = next(iter(row.values()))
        cells = [numbers[name], first.axis, name, count(first.tokens), str(len(row)), _ratio(row), f"{first.cache:.1%}"]
        tasks = tasks_seen(first.evaluation)
        for scoring in ("likelihood", "generation"):
            scores = table_of([one.correct for one in row.values()], scoring, tasks)
            against = versus(row, rows[DEFAULT], scoring) if DEFAULT in rows and name != DEFAULT else None
            cells += [points(interval_of(scores)) if tasks else "", points(against, "+") if against else ""]
        pairs = [(f.worse if f.better == name else f.better, f.is_sure) for f in turned if name in (f.better, f.worse)]
        others = {numbers[other]: is_sure for other, is_sure in pairs}
        cells.append(_kept(row, tasks))
        lines.append([*cells, ", ".join(n + "!" * others[n] for n in sorted(others, key=int))])
    return lines


def lines_of(results: Sequence[Result], findings: Findings = ()) -> list[str]:
    """What the table says, in sentences: its tasks, every flip, and whether findings hold."""
    rows, turned = by_row(results), flips(results)
    evaluation = results[0].evaluation
    if not (tasks := tasks_seen(evaluation)):
        return [f"The teacher has less than {SEEN:.0%} correct by generation in every task, so no gap can be seen."]
    of_teacher = {s: statistics.mean(evaluation.row(t, "teacher", s).score for t in tasks) for s in SCORINGS}
    lines = [
        f"Scores are means over {', '.join(tasks)}, in points with 95 % intervals; the teacher has"
        f" {100 * of_teacher['likelihood']:.1f} by likelihood and {100 * of_teacher['generation']:.1f} by generation."
    ]
    if any(len(row) == 1 for row in rows.values()):
        lines.append("The interval of a single seed knows the examples alone, not how much training itself varies.")
    for f in turned:
        sure = "by both intervals" if f.is_sure else "within the intervals"
        lines.append(
            f"Flip, {sure}: along {f.axis}, {f.better!r} is better than {f.worse!r} by likelihood"
            f" ({points(f.likelihood, '+')}) and worse by generation ({points(f.generation, '+')})."
        )
    if not turned:
        lines.append("No pair within an axis changes its order between the scoring methods.")
    return lines + [_finding(rows, *finding) for finding in findings]


def _finding(rows: dict[str, dict[int, Result]], title: str, without: str, what: str) -> str:
    """Whether a finding holds here, by the interval of the difference by generation."""
    found = {s: versus(rows[DEFAULT], rows[without], s) for s in SCORINGS} if {DEFAULT, without} <= set(rows) else {}
    written, ranked = found.get("generation"), found.get("likelihood")
    if written is None or ranked is None:
        return f"{title}: not measured yet; it takes the rows {DEFAULT!r} and {without!r}."
    verdict = {1: "holds here", 0: "not distinguishable here", -1: "the opposite holds here"}[written.sign]
    seeds = len(rows[DEFAULT].keys() & rows[without].keys())
    return (
        f"{title}: {verdict}; {what} changes the score by {points(written, '+')} points by generation"
        f" and by {points(ranked, '+')} by likelihood ({seeds} {'seed' if seeds == 1 else 'seeds'})."
    )


def points(found: Interval, sign: str = "") -> str:
    """An interval in percent."""
    return f"{100 * found.mean:{sign}z.1f} [{100 * found.low:{sign}z.1f}, {100 * found.high:{sign}z.1f}]"


def _ratio(row: dict[int, Result]) -> str:
    """Mean of the ratios of perplexities, and their range where there are several."""
    ratios = [result.ratio for result in row.values()]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.3f}{spread}"


def _kept(row: dict[int, Result], tasks: Sequence[str]) -> str:
    """The student's score by generation over its teacher's, means over tasks and seeds."""
    if not tasks:
        return ""
    pairs = [
        [one.evaluation.row(task, model, "generation").score for model in ("student", "teacher")]
        for one in row.values()
        for task in tasks
    ]
    student, teacher = (statistics.mean(scores) for scores in zip(*pairs, strict=True))
    return f"{student / teacher:.0%}"


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print the table."""
    table = Table(title="the default recipe, and one change at a time; ! marks a flip by both intervals")
    heads = ("row", "axis, change", "tokens", "seeds", "perplexity ratio", "by likelihood", "by generation", "flips")
    for column in heads:
        table.add_column(column, justify="left" if column == "axis, change" else "right", overflow="fold")
    for number, axis, name, tokens, seeds, ratio, cache, *scores, kept, turned in table_rows(results):
        ratio = ratio.replace(" (", "\n(") + f"\ncache {cache}"
        ranked, written = "\n".join(scores[:2]), "\n".join([*scores[2:], f"{kept} of the teacher's" if kept else ""])
        cells = number, f"{axis}\n{name}", tokens, seeds, ratio, ranked, written, turned
        table.add_row(*cells, end_section=True)
    console.print(table, soft_wrap=False)


def markdown(results: Sequence[Result], findings: Findings = ()) -> str:
    """The table and what it says as Markdown."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *table_rows(results)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    sentences = "\n".join(f"* {line}" for line in lines_of(results, findings))
    return f"{table}\n\nA `!` marks a flip by both intervals.\n\n{sentences}\n"
