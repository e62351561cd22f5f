"""Does likelihood flatter a student here too, and where does it turn a ranking round? ("When Perplexity Lies", arXiv
2603.26556.)

    python -m experiments.perplexity_lies                      # ten students of neox-nano, three seeds each: resumable

Students that differ in architecture, recipe and budget answer the same questions twice: by what they rank first, and by
what they write. Each is a run folder of its own; all answers are in one file, so that the teacher is asked once. Left
out are the tasks of which the teacher itself writes next to nothing right (`keys`, `needle`): there no gap can be seen.
A choice by likelihood has one chance in four of being right by luck, a written answer none."""

import argparse
import dataclasses
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from convert import load_teacher, recipes, run_recipe
from convert.cli import number_of_tokens, whole_number
from convert.core.console import Console
from convert.core.files import write_json
from convert.evaluation.runner import chosen, evaluate_tasks
from convert.models.loading import read_config, resolve
from convert.pipeline import finished
from convert.recipes.base import Recipe
from convert.recipes.overrides import with_setting
from convert.reports import charts
from convert.run import fail_in_words
from experiments.attention_editing import only

TASKS = "names,brackets,indentation,copying"


@dataclass(frozen=True)
class Student:
    target: str
    tokens: str = "200k"
    settings: tuple[str, ...] = ()
    alone: str = ""  # the one stage that is trained

    def recipe(self, teacher: str, seed: int) -> Recipe:
        source = resolve(teacher)
        budget = recipes.budget(source.name, read_config(source), number_of_tokens(self.tokens), seed=seed)
        recipe = recipes.RECIPES[self.target](dataclasses.replace(budget, questions=1))  # they are asked here
        for setting in self.settings:
            recipe = with_setting(recipe, setting)
        return only(self.alone)(recipe) if self.alone else recipe


STUDENTS = {
    "mamba2": Student("mamba2"),
    "mamba2, 50 k tokens": Student("mamba2", "50k"),
    "mamba2, 800 k tokens": Student("mamba2", "800k"),
    "mamba2, by cross-entropy": Student("mamba2", settings=("distill.cross_entropy=1", "distill.forward_kl=0")),
    "mamba2, without noise": Student("mamba2", settings=("distill.noise=0",)),
    "mamba": Student("mamba"),
    "linear": Student("linear"),
    "linear, stage 1 alone": Student("linear", alone="align"),
    "mla, an eighth of the cache": Student("mla", settings=("edit.cache_budget=0.125",)),
    "gate-swa, 16 tokens, no full layer": Student("gate-swa", settings=("edit.window=16", "edit.keep=none")),
}


def gaps(teacher, student, limit: int, file: Path) -> dict[str, dict[str, float]]:
    """Reading -> task -> points (0 to 1) behind the teacher, and "teacher READING" -> task -> what the teacher itself
    has."""
    models = {"teacher": teacher.model, "student": student.model}
    found = evaluate_tasks(models, teacher.tokenizer, chosen(TASKS, teacher.tokenizer), limit=limit, file=file)
    by: dict[str, dict[str, float]] = {}
    for row in found["gaps"]:
        by.setdefault(row["reading"], {})[row["task"]] = row["gap"]
    for row in found["rows"]:
        if row["model"] == "teacher":
            by.setdefault(f"teacher {row['reading']}", {})[row["task"]] = row["score"]
    return by


def reversals(rows: dict[str, list[dict]], task: str | None = None) -> list[tuple[str, str, bool]]:
    """Pairs whose order by mean likelihood gap is not that by mean generation gap: the better one by likelihood first,
    and whether every seed says so by both readings."""

    def of(name: str, reading: str) -> list[float]:
        return [statistics.mean(row[reading].values()) if task is None else row[reading][task] for row in rows[name]]

    found = []
    for a, b in itertools.permutations(rows, 2):
        ranks = [y - x for x, y in zip(of(a, "likelihood"), of(b, "likelihood"), strict=True)]
        writes = [x - y for x, y in zip(of(a, "generation"), of(b, "generation"), strict=True)]
        if statistics.mean(ranks) > 0 < statistics.mean(writes):
            found.append((a, b, min(ranks) > 0 < min(writes)))
    return found


def show(console: Console, rows: dict[str, list[dict]]) -> None:
    table = Table("student", title="points behind the teacher, mean (spread) of the seeds", title_justify="left")
    for column in ("perplexity ratio", "when it ranks", "when it writes", "writes - ranks"):
        table.add_column(column, justify="right")
    for name, some in sorted(rows.items(), key=lambda item: _mean(item[1], "generation")):
        ranks, writes = (
            [100 * statistics.mean(row[reading].values()) for row in some] for reading in ("likelihood", "generation")
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
        "teacher ranks",
        "behind",
        "lost",
        "teacher writes",
        "behind",
        "lost",
        "further behind when they write",
        "pairs that change places",
    ):
        table.add_column(column, justify="right")
    for task in TASKS.split(","):
        each = [row for some in rows.values() for row in some]
        cells = []
        for reading in ("likelihood", "generation"):
            behind, score = statistics.mean(row[reading][task] for row in each), each[0][f"teacher {reading}"][task]
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
        f"Of {pairs} pairs of students {len(turned)} change places between the readings, {sum(s for *_, s in turned)}"
        " by every seed:"
    )
    for better, worse, sure in turned:
        console.print(
            f"  {better} ranks better than {worse} and writes worse{', by every seed' if sure else ''}", highlight=False
        )


def _mean(some: list[dict], reading: str) -> float:
    return statistics.mean(statistics.mean(row[reading].values()) for row in some)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.1f} ({max(values) - min(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=64, help="questions of each task")
    parser.add_argument("--out", type=Path, default=Path("runs/perplexity-lies"))
    args = parser.parse_args()
    rows: dict[str, list[dict]] = {}
    teacher = load_teacher(args.teacher)
    for seed in range(args.seeds):
        for name, student in STUDENTS.items():
            place = args.out / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
            recipe = student.recipe(args.teacher, seed)
            report = finished(place, args.teacher, recipe, None) or run_recipe(
                args.teacher, recipe, place, wandb="disabled"
            )
            found = gaps(teacher, load_teacher(str(place)), args.limit, args.out / "answers.jsonl")
            rows.setdefault(name, []).append({"ratio": report["perplexity"]["ratio"]} | found)
            write_json(args.out / "gaps.json", rows)
    show(Console(), rows)
    points = [(name, 100 * _mean(some, "likelihood"), 100 * _mean(some, "generation")) for name, some in rows.items()]
    charts.write(charts.readings("perplexity-lies", points), args.out / "gaps.svg")
    Console().print(f"The chart is {args.out / 'gaps.svg'}, the numbers {args.out / 'gaps.json'}.")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
