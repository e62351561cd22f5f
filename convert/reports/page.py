"""report.html: a run, or several side by side, as one page that needs no network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup, escape

from convert.core import manifest
from convert.core.console import duration, size, visible
from convert.core.files import write_text
from convert.evaluation import runner as evaluation
from convert.evaluation.tasks import LETTERS
from convert.reports import charts, report
from convert.runs import records
from convert.runs.schemas import LENGTH

POINTS = 300  # of a curve


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, as data."""

    name: str
    report: dict
    evaluation: dict
    metrics: tuple[dict, ...]
    context: dict  # what experiments.context found; empty where nobody asked

    @staticmethod
    def read(folder: Path) -> "Run":
        found = records.report(folder)
        told = records.evaluation(folder) or found["evaluation"]
        return Run(
            visible(folder.name or folder.resolve().name),
            found,
            told,
            tuple(records.metrics(folder)),
            records.context(folder),
        )


def write_page(folders: Sequence[Path], out: Path) -> None:
    runs = [Run.read(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(runs))


def write_report_page(run: Path) -> None:
    """The page of a run, in its folder."""
    with manifest.renewing(run, "report.html"):
        write_page([run], run / "report.html")


def page(runs: Sequence[Run]) -> str:
    """The HTML. All that is not Markup is escaped, by the template."""
    environment = Environment(autoescape=True, trim_blocks=False)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    one = runs[0] if len(runs) == 1 else None
    return template.render(
        title=(
            f"{runs[0].report['teacher']} → {runs[0].report['target']}"
            if one
            else f"{len(runs)} conversions side by side"
        ),
        lead=[_sentence(run, named=one is None) for run in runs],
        cards=_cards(one) if one else [],
        findings=[
            line if one else f"{run.name}: {line}" for run in runs for line in evaluation.findings(run.evaluation)
        ],
        charts={"gaps": _gap_charts(runs), "training": _training_charts(runs), "context": _context_charts(runs)},
        scores=_scores(runs),
        letters=_letters(runs),
        harness=_harness(runs),
        needles=_needles(runs),
        steps=_steps(runs),
        texts=[text for run in runs for text in _texts(run, named=one is None)],
        facts=report.facts(one.report) if one else [],
        provenance=_provenance(runs),
        settings=[(f"Settings of {run.name}", json.dumps(run.report["settings"], indent=1)) for run in runs],
        table=_table,
        colours=charts.COLOURS,
    )


def _table(rows: Sequence[Sequence[str]]) -> Markup:
    """The first row is the head."""
    lines = [
        "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
        for kind, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return Markup("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def _sentence(run: Run, *, named: bool) -> str:
    ppl, found = run.report["perplexity"], run.report
    return (
        f"{run.name + ': p' if named else 'P'}erplexity on held-out text {ppl['student']:.3f}, the teacher's is"
        f" {ppl['teacher']:.3f} (ratio {ppl['ratio']:.4f}); {found['agreement']['top1']:.1%} of the first tokens are"
        f" the same; cache at {int(LENGTH):,} tokens {_cache(found, 'student') / _cache(found, 'teacher'):.1%} of the"
        " teacher's."
    )


def _cache(found: dict, who: str) -> int:
    return found["cache_bytes"]["formula"][who][LENGTH]


def _cards(run: Run) -> list[tuple[str, str, str]]:
    found, ppl, gaps = run.report, run.report["perplexity"], run.evaluation["gaps"]
    cards = [
        ("Perplexity", f"× {ppl['ratio']:.3f}", f"{ppl['teacher']:.2f} → {ppl['student']:.2f}"),
        ("Same first token", f"{found['agreement']['top1']:.1%}", f"KL {found['kl']['mean_nats']:.3f} nats"),
        (
            f"Cache at {int(LENGTH):,}",
            f"{_cache(found, 'student') / _cache(found, 'teacher'):.1%}",
            f"{size(_cache(found, 'teacher'))} → {size(_cache(found, 'student'))}",
        ),
        ("Training", duration(found["seconds"]["total"]), f"{found['tokens']['total']:,} tokens"),
    ]
    for reading, title in (("generation", "Gap when it writes"), ("likelihood", "Gap when it ranks")):
        if some := [row["gap"] for row in gaps if row["reading"] == reading]:
            cards.append((title, f"{100 * sum(some) / len(some):+.1f}", "points behind, mean of the tasks"))
    return cards


def _chart(title: str, svg: Markup) -> dict:
    return {"title": title, "svg": svg}


def _gap_charts(runs: Sequence[Run]) -> list[dict]:
    return [
        _chart(run.name if len(runs) > 1 else "Gap by task", charts.gaps(f"gaps{n}", run.evaluation["gaps"]))
        for n, run in enumerate(runs) if run.evaluation["gaps"]
    ]  # fmt: skip


def _training_charts(runs: Sequence[Run]) -> list[dict]:
    found = []
    for stage in dict.fromkeys(row["stage"] for run in runs for row in run.metrics):
        lines = [_curve(run, "train/loss", stage) for run in runs]
        found.append(
            _chart(
                f"Loss of {stage}",
                charts.curves(f"loss-{stage}", [line for line in lines if line[1]], "loss", log=True),
            )
        )
    for key, title, log in (
        ("held_out/perplexity", "Held-out perplexity", True),
        ("held_out/generation", "Questions answered in writing", False),
    ):
        lines = [line for run in runs if (line := _curve(run, key))[1]]
        if lines:
            found.append(
                _chart(title, charts.curves(key.replace("/", "-"), lines, title.lower(), log=log, zero=not log))
            )
    return found


def _curve(run: Run, key: str, stage: str | None = None) -> charts.Curve:
    """Thinned, so that the page stays small: means of neighbours."""
    rows = [(row["tokens"], row[key]) for row in run.metrics if key in row and stage in (None, row["stage"])]
    step = max(1, len(rows) // POINTS)
    groups = [rows[i : i + step] for i in range(0, len(rows), step)]
    return run.name, [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]


def _context_charts(runs: Sequence[Run]) -> list[dict]:
    sizes, speeds, firsts, positions = [], [], [], []
    for label, run, who in _models(runs):
        formula = run.report["cache_bytes"]["formula"][who]
        sizes.append((label, [int(length) for length in formula], list(formula.values())))
        if rows := _costs(run, who):
            speeds.append((label, [row["length"] for row in rows], [row["tokens_per_s"] for row in rows]))
            firsts.append((label, [row["length"] for row in rows], [row["first_token_s"] for row in rows]))
        if seen := run.context.get("perplexity_by_position", {}).get(who):
            positions.append((label, [max(32, int(start)) for start in seen], list(seen.values())))
    points = [(label, _cache(run.report, who), run.report["perplexity"][who]) for label, run, who in _models(runs)]
    shown = [
        _chart("Quality against cache", charts.quality("quality", points, int(LENGTH))),
        _chart("Cache", charts.by_context("cache", sizes, "bytes of cache", in_bytes=True)),
    ]
    if speeds:
        shown.append(_chart("Speed", charts.by_context("speed", speeds, "tokens per second")))
        shown.append(_chart("Time to the first token", charts.by_context("first", firsts, "seconds")))
    if positions:
        shown.append(_chart("Perplexity by the tokens before", charts.by_context("positions", positions, "perplexity")))
    return shown


def _costs(run: Run, who: str) -> list[dict]:
    """As far as somebody measured them, else as far as the run did."""
    asked = [row for row in run.context.get("costs", ()) if row["model"] == who]
    return asked or run.report.get("contexts", {}).get(who, [])


def _needles(runs: Sequence[Run]) -> list[list[str]]:
    """Found when it writes / when it ranks."""
    cells, heads = {}, []
    for label, run, who in _models(runs):
        rows = [row for row in run.context.get("needles", ()) if row["model"] == who]
        heads += [label] if rows else []
        for row in rows:
            cells.setdefault((row["length"], row["depth"]), {})[label] = (
                f"{row['generation']:.0%} / {row['likelihood']:.0%}"
            )
    rows = [
        [f"{length:,}", f"{depth:.0%}", *(found.get(head, "") for head in heads)]
        for (length, depth), found in cells.items()
    ]
    return [["tokens", "depth", *heads], *rows] if rows else []


def _models(runs: Sequence[Run]) -> list[tuple[str, Run, str]]:
    """Every teacher once on the same text, then the students."""
    teachers = {}
    for run in runs:
        name, value = run.report["teacher"], run.report["perplexity"]["teacher"]
        label = (
            "teacher"
            if len(runs) == 1
            else name
            if not any(name == other for other, _ in teachers)
            else f"{name}, text of {run.name}"
        )
        teachers.setdefault((name, round(value, 3)), (label, run, "teacher"))
    return [*teachers.values(), *((run.name if len(runs) > 1 else "student", run, "student") for run in runs)]


def _scores(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each task and reading; what is about writing stands where they write."""
    head = ["task", "by", "teacher, %", "student, %", "behind, points", "n"]
    head += ["unparsable", "repetition", "distinct 2", "same text", "differs at"]
    rows = [["run", *head] if len(runs) > 1 else head]
    for run in runs:
        found = {(row["task"], row["reading"], row["model"]): row for row in run.evaluation["rows"]}
        for gap in run.evaluation["gaps"]:
            both = [found[gap["task"], gap["reading"], who] for who in ("teacher", "student")]
            cells = [gap["task"], gap["reading"]]
            cells += [_with_interval(row, "score") for row in both]
            cells += [_with_interval(gap, "gap"), str(gap["n"])]
            cells += [
                " / ".join(f"{row[key]:.0%}" for row in both if key in row)
                for key in ("unparsable", "repetition", "distinct_2")
            ]
            student = both[1]
            cells.append(f"{student['same_text']:.0%}" if "same_text" in student else "")
            cells.append(
                f"token {student['first_divergence'] + 1:.0f}" if student.get("first_divergence") is not None else ""
            )
            rows.append([run.name, *cells] if len(runs) > 1 else cells)
    return rows if len(rows) > 1 else []


def _harness(runs: Sequence[Run]) -> list[list[str]]:
    """What lm-evaluation-harness found, where it was asked."""
    rows = [["task", "by", "metric", "n", "model", "score"]]
    for run in runs:
        for row in run.evaluation.get("lm_eval", ()):
            who = row["model"] if len(runs) == 1 else f"{run.name}: {row['model']}"
            error = "" if row["error"] is None else f" ± {row['error']:.4f}"
            rows.append([row["task"], row["reading"], row["metric"], str(row["n"]), who, f"{row['score']:.4f}{error}"])
    return rows if len(rows) > 1 else []


def _with_interval(row: dict, key: str) -> str:
    return f"{100 * row[key]:.1f} ({round(100 * row['low'])} to {round(100 * row['high'])})"


def _letters(runs: Sequence[Run]) -> list[list[str]]:
    """Of tasks that are answered by a letter: which are said, and whether they stay when the options change places."""
    rows = [["task", "model", "by", *LETTERS, "no letter", "same letter in four orders"]]
    for run in runs:
        for row in run.evaluation["rows"]:
            if "letters" in row:
                who = row["model"] if len(runs) == 1 else f"{run.name}: {row['model']}"
                shares = [f"{row['letters'][letter]:.0%}" for letter in LETTERS]
                rows.append(
                    [row["task"], who, row["reading"], *shares, f"{row['unparsable']:.0%}", f"{row['stickiness']:.2f}"]
                )
    return rows if len(rows) > 1 else []


def _steps(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["step", "tokens", "time", "first loss", "last loss", "perplexity after"]]
    for run in runs:
        for row in run.report["steps"]:
            name = row["name"] if len(runs) == 1 else f"{run.name}: {row['name']}"
            trained = [""] * 4
            if row["tokens"]:
                trained = [
                    f"{row['tokens']:,}",
                    duration(row["seconds"]),
                    f"{row['loss_first']:.4f}",
                    f"{row['loss_last']:.4f}",
                ]
            rows.append([name, *trained, f"{row['perplexity_after']:.3f}"])
    return rows


def _texts(run: Run, *, named: bool) -> list[dict]:
    found = []
    for row in run.report["continuations"]:
        same = commonprefix([row["teacher"], row["student"]])
        student = f"student of {run.name}" if named else "student"
        rows = [("teacher", row["teacher"], ""), (student, same, row["student"][len(same) :])]
        found.append({"prompt": row["prompt"], "rows": rows})
    return found


def _provenance(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["", *(run.name for run in runs)]]
    for label, value in (
        ("teacher", lambda r: r["settings"]["teacher"]),
        ("target", lambda r: r["target"]),
        ("data", lambda r: f"{r['settings']['data']} ({r['settings']['data_fingerprint'][:12]})"),
        ("seed", lambda r: str(r["seed"])),
        ("device", lambda r: r["device"]),
        ("commit", lambda r: r["commit"] or "unknown"),
        ("versions", lambda r: ", ".join(f"{name} {version}" for name, version in r["versions"].items() if version)),
    ):
        rows.append([label, *(value(run.report) for run in runs)])
    return rows
