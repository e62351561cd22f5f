"""Sections of the page of language models: scores, caches, speeds and continuations, of one run or of several."""

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from convert.core.console import duration, size
from convert.reports import charts
from convert.reports.scores import findings
from convert.reports.sections import Card, Chart, PageSection, Run, Table, Texts
from convert.runs.evaluation_schemas import LETTERS, Gap, Score
from convert.runs.keys import MODELS, SCORINGS, ModelName
from convert.runs.language_schemas import LENGTH, ContextCost, LanguageReport
from convert.runs.win_and_tie import needed_tolerances, win_and_tie

LanguageRun = Run[LanguageReport]


def lead(run: LanguageRun) -> str:
    """Quality and cost in one sentence."""
    ppl, report = run.report.perplexity, run.report
    return (
        f"perplexity on held-out text {ppl.student:.3f}, the teacher's is {ppl.teacher:.3f} (ratio {ppl.ratio:.4f});"
        f" top-1 agreement on the next token {report.agreement.top1:.1%}; cache at {int(LENGTH):,} tokens"
        f" {_cache(report, 'student') / _cache(report, 'teacher'):.1%} of the teacher's."
    )


def _cache(report: LanguageReport, model: ModelName) -> int:
    """Cache of one sequence at the length of comparison, by formula, in bytes."""
    return _of(report.cache_bytes.formula, model)[LENGTH]


def _of(both: Any, model: ModelName) -> Any:
    """The teacher's or the student's field of a record that has both."""
    return both.teacher if model == "teacher" else both.student


def cards(run: LanguageRun) -> list[Card]:
    """The numbers in large type."""
    report, ppl = run.report, run.report.perplexity
    teacher, student = _cache(report, "teacher"), _cache(report, "student")
    found = [
        Card("Perplexity", f"× {ppl.ratio:.3f}", f"{ppl.teacher:.2f} → {ppl.student:.2f}"),
        Card("Top-1 agreement", f"{report.agreement.top1:.1%}", f"KL {report.kl.mean_nats:.3f} nats"),
        Card(f"Cache at {int(LENGTH):,}", f"{student / teacher:.1%}", f"{size(teacher)} → {size(student)}"),
        Card("Training", duration(report.seconds.total), f"{report.tokens.total:,} tokens"),
    ]
    for scoring in SCORINGS:
        gap = run.evaluation.mean_gap(scoring)
        if gap is not None:
            found.append(Card(f"Gap by {scoring}", f"{100 * gap:+.1f}", "points behind, mean of the tasks"))
        if (row := win_and_tie(run.evaluation, scoring)) is not None:
            note = f"of {row.tasks} tasks by {scoring}, within {row.tolerance:.0%} of the teacher"
            found.append(Card("Wins and ties", f"{row.rate:.0%}", note))
    return found


def results(runs: Sequence[LanguageRun]) -> list[PageSection]:
    """The scores: what a student lost, by task and scoring method."""
    several = len(runs) > 1
    return [
        PageSection(
            "Behind the teacher, by generation and by likelihood",
            lines=[f"{run.name}: {line}" if several else line for run in runs for line in findings(run.evaluation)],
            charts=[chart for n, run in enumerate(runs) for chart in _gap_charts(run, n, named=several)],
            tables=[
                Table(
                    _score_rows(runs),
                    note="Scores and gaps with their 95 % intervals over the examples, the gap's paired; two numbers"
                    " are the teacher's / the student's.",
                ),
                Table(
                    _letter_rows(runs),
                    "By the letter",
                    "Every example comes in four orders of its options. 0: the letter follows the content; 1: it stays"
                    " where it is.",
                ),
                Table(_lm_eval_rows(runs), "lm-evaluation-harness"),
            ],
        )
    ]


def _gap_charts(run: LanguageRun, number: int, *, named: bool) -> list[Chart]:
    """The gaps by task, and the win-and-tie rate over its tolerance."""
    if not run.evaluation.gaps:
        return []
    found = [Chart(run.name if named else "Gap by task", charts.gaps(f"gaps{number}", run.evaluation.gaps))]
    needed = {scoring: some for scoring in SCORINGS if (some := needed_tolerances(run.evaluation, scoring))}
    if needed:
        title = f"{run.name}: wins and ties" if named else "Win-and-tie rate by tolerance"
        found.append(Chart(title, charts.win_and_tie(f"ties{number}", needed)))
    return found


def _score_rows(runs: Sequence[LanguageRun]) -> list[list[str]]:
    """A row for each task and scoring method; what is about texts stands in the rows by generation."""
    head = ["task", "scoring", "teacher, %", "student, %", "gap, points", "n"]
    head += ["unparsable", "repetition", "distinct 2", "same text", "differs at"]
    rows = [["run", *head] if len(runs) > 1 else head]
    for run in runs:
        for gap in run.evaluation.gaps:
            teacher, student = (run.evaluation.row(gap.task, model, gap.scoring) for model in MODELS)
            cells = [gap.task, gap.scoring]
            cells += [_with_interval(row, row.score) for row in (teacher, student)]
            cells += [_with_interval(gap, gap.gap), str(gap.n)]
            for key in ("unparsable", "repetition", "distinct_2"):
                shares = [getattr(row, key) for row in (teacher, student)]
                cells.append(" / ".join(f"{share:.0%}" for share in shares if share is not None))
            cells.append("" if student.same_text is None else f"{student.same_text:.0%}")
            cells.append("" if student.first_divergence is None else f"token {student.first_divergence + 1:.0f}")
            rows.append([run.name, *cells] if len(runs) > 1 else cells)
    return rows


def _with_interval(row: Score | Gap, value: float) -> str:
    return f"{100 * value:.1f} ({round(100 * row.low)} to {round(100 * row.high)})"


def _letter_rows(runs: Sequence[LanguageRun]) -> list[list[str]]:
    """Which letters are predicted, and whether they stay when the options change places."""
    rows = [["task", "model", "scoring", *LETTERS, "no letter", "same letter in four orders"]]
    for run in runs:
        for row in run.evaluation.rows:
            if row.letters is not None:
                model = row.model if len(runs) == 1 else f"{run.name}: {row.model}"
                shares = [f"{row.letters[letter]:.0%}" for letter in LETTERS]
                rows.append(
                    [row.task, model, row.scoring, *shares, f"{row.unparsable:.0%}", f"{row.stickiness or 0:.2f}"]
                )
    return rows


def _lm_eval_rows(runs: Sequence[LanguageRun]) -> list[list[str]]:
    """What lm-evaluation-harness found, where it was run."""
    rows = [["task", "scoring", "metric", "n", "model", "score"]]
    for run in runs:
        for row in run.evaluation.lm_eval:
            model = row.model if len(runs) == 1 else f"{run.name}: {row.model}"
            error = "" if row.error is None else f" ± {row.error:.4f}"
            rows.append([row.task, row.scoring, row.metric, str(row.n), model, f"{row.score:.4f}{error}"])
    return rows


def costs(runs: Sequence[LanguageRun]) -> list[PageSection]:
    """What a context costs, what it is good for, and what both models write."""
    needles = Table(_needle_rows(runs), "One assignment in a long text, found by generation / by likelihood")
    probes = Table(_probe_rows(runs), "Recall in a text, by generation / by likelihood (chance: 25%)")
    return [
        PageSection("What a context costs", charts=_context_charts(runs), tables=[needles, probes]),
        PageSection(
            "Written by both",
            "Greedy continuations of held-out text; the mark begins at the first difference from the teacher.",
            texts=[texts for run in runs for texts in _texts(run, named=len(runs) > 1)],
        ),
    ]


def _context_charts(runs: Sequence[LanguageRun]) -> list[Chart]:
    models = _models(runs)
    points = [(label, _cache(run.report, model), _of(run.report.perplexity, model)) for label, run, model in models]
    sizes, positions = [], []
    for label, run, model in models:
        formula = _of(run.report.cache_bytes.formula, model)
        sizes.append((label, [int(length) for length in formula], list(formula.values())))
        if seen := run.context.perplexity_by_position.get(model):
            positions.append((label, [max(32, int(start)) for start in seen], list(seen.values())))
    speeds = _cost_lines(runs, lambda cost: cost.tokens_per_s)
    firsts = _cost_lines(runs, lambda cost: cost.time_to_first_token_s)
    shown = [
        Chart("Quality against cache", charts.quality("quality", points, int(LENGTH))),
        Chart("Cache", charts.by_context("cache", sizes, "bytes of cache", in_bytes=True)),
    ]
    if speeds:
        shown.append(Chart("Speed", charts.by_context("speed", speeds, "tokens per second")))
        shown.append(Chart("Time to first token", charts.by_context("first", firsts, "seconds")))
    if positions:
        shown.append(Chart("Perplexity by the tokens before", charts.by_context("positions", positions, "perplexity")))
    return shown


def _cost_lines(runs: Sequence[LanguageRun], number: Callable[[ContextCost], float]) -> list[charts.Line]:
    """A number of each model by context length, as far as experiments.context measured it, else as far as the run
    did."""
    lines: list[charts.Line] = []
    for label, run, model in _models(runs):
        found: list[ContextCost] = [cost for cost in run.context.costs if cost.model == model]
        found = found or _of(run.report.contexts, model)
        if found:
            lines.append((label, [cost.length for cost in found], [number(cost) for cost in found]))
    return lines


def _needle_rows(runs: Sequence[LanguageRun]) -> list[list[str]]:
    """What was found by generation / by likelihood, by length and depth."""
    scores = {label: [n for n in run.context.needles if n.model == model] for label, run, model in _models(runs)}
    return _by_place(["tokens", "depth"], scores, lambda n: (f"{n.length:,}", f"{n.depth:.0%}"))


def _probe_rows(runs: Sequence[LanguageRun]) -> list[list[str]]:
    """Scores on the probes by generation / by likelihood, by task and length."""
    scores = {label: [p for p in run.context.probes if p.model == model] for label, run, model in _models(runs)}
    return _by_place(["probe", "tokens"], scores, lambda p: (p.task, f"{p.length:,}"))


def _by_place(
    heads: list[str], scores: Mapping[str, Sequence[Any]], place: Callable[[Any], tuple[str, str]]
) -> list[list[str]]:
    """A head, and a row for each place that any of the models has a score at."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for label, found in scores.items():
        for score in found:
            cells.setdefault(place(score), {})[label] = f"{score.generation:.0%} / {score.likelihood:.0%}"
    labels = [label for label, found in scores.items() if found]
    return [[*heads, *labels], *([*at, *(cell.get(label, "") for label in labels)] for at, cell in cells.items())]


def _models(runs: Sequence[LanguageRun]) -> list[tuple[str, LanguageRun, ModelName]]:
    """(label, run, model): every teacher once on the same text, then the students."""
    teachers: dict[tuple[str, float], tuple[str, LanguageRun, ModelName]] = {}
    for run in runs:
        name, value = run.report.teacher, run.report.perplexity.teacher
        label = "teacher" if len(runs) == 1 else name
        if len(runs) > 1 and any(name == other for other, _ in teachers):
            label = f"{name}, text of {run.name}"
        teachers.setdefault((name, round(value, 3)), (label, run, "teacher"))
    return [*teachers.values(), *((run.name if len(runs) > 1 else "student", run, "student") for run in runs)]


def _texts(run: LanguageRun, *, named: bool) -> list[Texts]:
    found = []
    for row in run.report.continuations:
        same = commonprefix([row.teacher, row.student])
        student = f"student of {run.name}" if named else "student"
        rows = [("teacher", row.teacher, ""), (student, same, row.student[len(same) :])]
        found.append(Texts(row.prompt, rows))
    return found
