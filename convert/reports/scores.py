"""Scores of an evaluation, for people: the tables in a terminal, and what they say in sentences."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from convert.core.console import Console
from convert.runs.evaluation_schemas import Evaluation, Gap, LmEvalScore, Score, tasks_of
from convert.runs.keys import SCORINGS
from convert.runs.win_and_tie import win_and_tie

STICKY = 0.5  # stickiness above which a model is said to follow the label (ours)


def show(found: Evaluation, console: Console) -> None:
    """Print the scores by task, and what they say in a line; nothing where there is no task."""
    if not found.rows:
        return
    models = list(dict.fromkeys(row.model for row in found.rows))
    table = Table(box=box.SIMPLE_HEAD, title="examples answered correctly, in %", title_justify="left")
    table.add_column("task")
    for scoring in SCORINGS:
        for number, column in enumerate([*models, *(["gap, 95 %"] if found.gaps else [])]):
            table.add_column(f"{'by ' + scoring if number == 0 else ''}\n{column}", justify="right", no_wrap=True)
    table.add_column("\nunparsable", justify="right")
    table.add_column("\nn", justify="right")
    for task in tasks_of(found.rows):
        cells = [task]
        for scoring in SCORINGS:
            rows = [found.row(task, model, scoring) for model in models]
            cells += [f"{100 * row.score:z.1f}" if found.gaps else with_interval(row, row.score) for row in rows]
            if found.gaps:
                gap = found.gap(task, scoring)
                cells.append(with_interval(gap, gap.gap))
        written = [found.row(task, model, "generation") for model in models]
        unparsable = " / ".join(f"{row.unparsable:.0%}" for row in written)
        table.add_row(*cells, unparsable, str(written[0].n))
    console.print(table, soft_wrap=False)
    for line in findings(found):
        console.print(line, highlight=False)


def with_interval(row: Score | Gap, value: float) -> str:
    """A score or gap and its interval, in percent."""
    return f"{100 * value:z.1f} [{100 * row.low:z.0f}, {100 * row.high:z.0f}]"


def findings(found: Evaluation) -> list[str]:
    """What the scores say, in sentences."""
    lines = []
    generation, likelihood = (found.mean_gap(scoring) for scoring in SCORINGS)
    if generation is not None and likelihood is not None:
        lines.append(
            f"Against its teacher the student is {_behind(generation)} by generation, and {_behind(likelihood)} by"
            " likelihood (mean of the tasks)."
        )
    lines += win_and_tie_lines(found)
    for row in found.rows:
        if row.letters and (row.stickiness or 0) > STICKY and row.scoring == "generation":
            most, share = max(row.letters.items(), key=lambda pair: pair[1])
            lines.append(
                f"The {row.model} follows the label, not the content, in {row.task}: it predicts {most} in"
                f" {share:.0%} of the items, and mostly the same letter whatever the order of the options"
                f" (stickiness {row.stickiness:.2f})."
            )
    return lines


def win_and_tie_lines(found: Evaluation) -> list[str]:
    """The win-and-tie rate by each scoring method, a sentence each."""
    lines = []
    for scoring in SCORINGS:
        if (row := win_and_tie(found, scoring)) is None:
            continue
        low, count, high = (round(row.tasks * share) for share in (row.low, row.rate, row.high))
        noise = "" if low == high else f" ({low} to {high} within the gaps' 95 % intervals)"
        lines.append(
            f"Win-and-tie rate by {scoring} {row.rate:.0%}: on {count} of {row.tasks} tasks{noise} the student is"
            f" within {row.tolerance:.0%} of its teacher's score."
            f" Half of the tasks need a tolerance of {row.critical:.1%}."
        )
    return lines


def _behind(gap: float) -> str:
    return f"{100 * abs(gap):.1f} points {'behind' if gap >= 0 else 'ahead'}"


def show_lm_eval(rows: Sequence[LmEvalScore], console: Console) -> None:
    """Print the scores by lm-evaluation-harness."""
    models = list(dict.fromkeys(row.model for row in rows))
    table = Table(box=box.SIMPLE_HEAD, title="lm-evaluation-harness", title_justify="left")
    for column in ("task", "scoring", "metric", *models, *(["gap"] if len(models) == 2 else []), "n"):
        table.add_column(column, justify="left" if column in ("task", "scoring", "metric") else "right")
    by_key: dict[tuple[str, str, str], dict[str, LmEvalScore]] = {}
    for row in rows:
        by_key.setdefault((row.task, row.scoring, row.metric), {})[row.model] = row
    for key, found in by_key.items():
        cells = [
            f"{row.score:.4f}" + (f" ± {row.error:.4f}" if row.error is not None else "") for row in found.values()
        ]
        gap = [f"{found['teacher'].score - found['student'].score:+.4f}"] if len(models) == 2 else []
        table.add_row(*key, *cells, *gap, str(next(iter(found.values())).n))
    console.print(table, soft_wrap=False)


def markdown_table(found: Evaluation) -> str:
    """The scores of teacher and student as Markdown; empty where there is no gap."""
    if not found.gaps:
        return ""
    heads = [f"{column} by {scoring}" for scoring in SCORINGS for column in ("teacher", "student", "gap (95 %)")]
    rows = [["task", *heads, "student's unparsable", "n"]]
    rows.append(["---"] * len(rows[0]))
    for task in tasks_of(found.gaps):
        cells = [task]
        for scoring in SCORINGS:
            cells += [f"{found.row(task, model, scoring).score:.1%}" for model in ("teacher", "student")]
            gap = found.gap(task, scoring)
            cells.append(f"{100 * gap.gap:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]")
        written = found.row(task, "student", "generation")
        rows.append([*cells, f"{written.unparsable:.0%}", str(written.n)])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    sentences = "\n".join(f"* {line}" for line in win_and_tie_lines(found))
    return f"## Examples answered correctly\n\n{lines}\n" + (f"\n{sentences}\n" if sentences else "")
