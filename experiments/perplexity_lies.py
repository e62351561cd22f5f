"""Does likelihood flatter a student here too, and where does it turn a ranking round? ("When Perplexity Lies", arXiv
2603.26556.)

    python -m experiments.perplexity_lies                      # ten students of neox-nano, three seeds each: resumable

Students that differ in architecture, recipe and budget are scored twice on the same examples: by likelihood, and by
generation. Each is a run folder of its own; all answers are in one file, so that the teacher answers once. Left out are
the tasks of which the teacher itself has next to nothing correct by generation (`keys`, `needle`): there no gap can be
seen. A choice by likelihood has one chance in four of being correct by luck, a written answer none."""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from convert import load_teacher
from convert.cli import fail_in_words, whole_number
from convert.core.console import Console
from convert.core.files import write_json
from convert.evaluation.runner import chosen, evaluate_tasks
from convert.models.loading import Teacher
from convert.reports import charts
from experiments.variants import Variant, folder_of, report_of

TASKS = "names,brackets,indentation,copying"
Rows = dict[str, list[dict[str, Any]]]  # student -> of each seed the ratio of perplexities, and its gaps


TOKENS = 200_000
STUDENTS = {  # name -> recipe, tokens
    "mamba2": (Variant("mamba2"), TOKENS),
    "mamba2, 50 k tokens": (Variant("mamba2"), 50_000),
    "mamba2, 800 k tokens": (Variant("mamba2"), 800_000),
    "mamba2, by cross-entropy": (Variant("mamba2", ("distill.cross_entropy=1", "distill.forward_kl=0")), TOKENS),
    "mamba2, without noise": (Variant("mamba2", ("distill.noise=0",)), TOKENS),
    "mamba": (Variant("mamba"), TOKENS),
    "linear": (Variant("linear"), TOKENS),
    "linear, stage 1 alone": (Variant("linear", only="align"), TOKENS),
    "mla, an eighth of the cache": (Variant("mla", ("edit.cache_budget=0.125",)), TOKENS),
    "gate-swa, 16 tokens, no full layer": (Variant("gate-swa", ("edit.window=16", "edit.keep=none")), TOKENS),
}


Gaps = dict[str, dict[str, float]]


def gaps(teacher: Teacher, student: Teacher, limit: int, file: Path) -> Gaps:
    """Scoring method -> task -> gap to the teacher (0 to 1), and "teacher METHOD" -> task -> the teacher's score."""
    models = {"teacher": teacher.model, "student": student.model}
    found = evaluate_tasks(models, teacher.tokenizer, chosen(TASKS, teacher.tokenizer), limit=limit, file=file)
    by: Gaps = {}
    for gap in found.gaps:
        by.setdefault(gap.scoring, {})[gap.task] = gap.gap
    for row in found.rows:
        if row.model == "teacher":
            by.setdefault(f"teacher {row.scoring}", {})[row.task] = row.score
    return by


def reversals(rows: Rows, task: str | None = None) -> list[tuple[str, str, bool]]:
    """Pairs whose order by mean likelihood gap is not that by mean generation gap: the better one by likelihood first,
    and whether every seed says so by both scoring methods."""

    def of(name: str, scoring: str) -> list[float]:
        return [statistics.mean(row[scoring].values()) if task is None else row[scoring][task] for row in rows[name]]

    found = []
    for a, b in itertools.permutations(rows, 2):
        ranks = [y - x for x, y in zip(of(a, "likelihood"), of(b, "likelihood"), strict=True)]
        writes = [x - y for x, y in zip(of(a, "generation"), of(b, "generation"), strict=True)]
        if statistics.mean(ranks) > 0 < statistics.mean(writes):
            found.append((a, b, min(ranks) > 0 < min(writes)))
    return found


def show(console: Console, rows: Rows) -> None:
    """Print the gaps by student and by task, and the pairs that change places."""
    table = Table("student", title="points behind the teacher, mean (spread) of the seeds", title_justify="left")
    for column in ("perplexity ratio", "by likelihood", "by generation", "difference"):
        table.add_column(column, justify="right")
    for name, some in sorted(rows.items(), key=lambda item: _mean(item[1], "generation")):
        ranks, writes = (
            [100 * statistics.mean(row[scoring].values()) for row in some] for scoring in ("likelihood", "generation")
        )
        more = [w - r for r, w in zip(ranks, writes, strict=True)]
        table.add_row(
            name, f"{statistics.mean(row['ratio'] for row in some):.3f}", *map(_spread, (ranks, writes, more))
        )
    console.print(table)
    table = Table(
        "task",
        title="the same by task, mean of all students: points, and the share of the teacher's score",
        title_justify="left",
    )
    for column in (
        "teacher by likelihood",
        "behind",
        "lost",
        "teacher by generation",
        "behind",
        "lost",
        "further behind by generation",
        "pairs that change places",
    ):
        table.add_column(column, justify="right")
    for task in TASKS.split(","):
        each = [row for some in rows.values() for row in some]
        cells = []
        for scoring in ("likelihood", "generation"):
            behind, score = statistics.mean(row[scoring][task] for row in each), each[0][f"teacher {scoring}"][task]
            cells += [f"{100 * score:.1f}", f"{100 * behind:.1f}", f"{behind / score:.0%}" if score else ""]
        worse = sum(row["generation"][task] > row["likelihood"][task] for row in each)
        turned = reversals(rows, task)
        table.add_row(
            task, *cells, f"{worse} of {len(each)}", f"{len(turned)}, {sum(sure for *_, sure in turned)} by every seed"
        )
    console.print(table)
    pairs = len(rows) * (len(rows) - 1) // 2
    turned = reversals(rows)
    console.print(
        f"Of {pairs} pairs of students {len(turned)} change places between the scoring methods,"
        f" {sum(s for *_, s in turned)} by every seed:"
    )
    for better, worse, sure in turned:
        seeds = ", by every seed" if sure else ""
        console.print(
            f"  {better} is better than {worse} by likelihood and worse by generation{seeds}", highlight=False
        )


def _mean(some: list[dict[str, Any]], scoring: str) -> float:
    return statistics.mean(statistics.mean(row[scoring].values()) for row in some)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.1f} ({max(values) - min(values):.1f})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=64, help="examples of each task")
    parser.add_argument("--out", type=Path, default=Path("runs/perplexity-lies"))
    args = parser.parse_args()
    rows: Rows = {}
    teacher = load_teacher(args.teacher)
    for seed in range(args.seeds):
        for name, (variant, tokens) in STUDENTS.items():
            place = folder_of(args.out, name, seed)
            report = report_of(args.teacher, variant.recipe(args.teacher, tokens, seed=seed), place)
            found = gaps(teacher, load_teacher(str(place)), args.limit, args.out / "answers.jsonl")
            rows.setdefault(name, []).append({"ratio": report.perplexity.ratio} | found)
            write_json(args.out / "gaps.json", rows)
    show(Console(), rows)
    points = [(name, 100 * _mean(some, "likelihood"), 100 * _mean(some, "generation")) for name, some in rows.items()]
    charts.write(charts.gaps_by_scoring("perplexity-lies", points), args.out / "gaps.svg")
    Console().print(f"The chart is {args.out / 'gaps.svg'}, the numbers {args.out / 'gaps.json'}.")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
