"""What does it cost a student to learn from a recording of its teacher, and what does it save?

    python -m experiments.offline_teacher                       # neox-nano -> mamba, 100 k tokens: resumable, minutes
    python -m experiments.offline_teacher --tokens 1M --seeds 3

Every student starts from the same aligned one and sees the same batches; it learns from the teacher itself, from its K
most likely tokens, from tokens that were drawn, or from both. Speeds are tokens per second of the processor's time on
one thread, which other processes on the machine change less than those of the clock."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from convert import load_teacher
from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core import json_lines
from convert.core.console import console, size
from convert.core.files import write_text
from convert.data.recorded import Recorded, RecordedBatches, Recording
from convert.domains.language import Language
from convert.evaluation.perplexity import compare
from convert.models.absent import out_of_memory
from convert.models.catalog import resolve
from convert.steps import recorded
from convert.training.distill import distill
from experiments.trainings import train_all
from experiments.variants import Variant, report_of

TABLE = "table.md"
ALIGNED = 50_000  # tokens, of which the recipe gives a tenth to align (ours)


@dataclass(frozen=True)
class Row:
    """What is kept of the teacher; nothing: it teaches itself."""

    top_k: int = 0
    sample: int = 0

    @property
    def name(self) -> str:
        parts = [f"top {self.top_k}"] * bool(self.top_k) + [f"{self.sample} drawn"] * bool(self.sample)
        return " + ".join(parts) or "the teacher"


ROWS = (Row(), Row(16), Row(64), Row(256), Row(0, 64), Row(16, 48))


class Bench:
    """The teacher, the start and the text that trainings share."""

    def __init__(self, name: str, target: str, start: Path, tokens: int, seed: int) -> None:
        self.name, self.start, self.domain = name, start, Language()
        self.teacher = load_teacher(name)
        recipe = Variant(target, only="distill").recipe(name, tokens, seed=seed)
        self.settings = dataclasses.replace(recipe.measured_by, evaluate_every=0)
        corpus = self.domain.corpus(resolve(name).data)
        self.data = self.domain.prepare(corpus, self.teacher, tokens, self.settings)
        self.held_out = self.domain.held_out(self.data, 1 << 18, self.settings)

    def record(self, row: Row, folder: Path) -> float:
        """Record the teacher; the processor's seconds."""
        started = time.process_time()
        kept = {"vocab_size": self.teacher.model.config.vocab_size, "top_k": row.top_k, "sample": row.sample}
        origins = self.domain.origins(self.teacher, self.data)
        recording = Recording(folder, recorded.about(origins, self.settings, kept))
        recording.begin()
        batches = self.domain.batches(self.data, self.settings)
        recorded.record(recording, self.teacher.model, batches, self.settings)
        return time.process_time() - started

    def train(self, row: Row, folder: Path) -> dict[str, Any]:
        """Train one student: the line of the results."""
        found: dict[str, Any] = dataclasses.asdict(row) | {
            "seed": self.settings.seed,
            "tokens": self.settings.units,
        }  # not those of the comparison
        student, batches = load_teacher(self.start).model, self.domain.batches(self.data, self.settings)
        if row == Row():
            started = time.process_time()
            distill(student, self.teacher.model, batches, self.settings)
        else:
            found["seconds_to_record"] = self.record(row, folder)
            found["bytes"] = sum(file.stat().st_size for file in (folder / "parts").iterdir())
            with out_of_memory(self.teacher.model, lambda: load_teacher(self.name).model):
                started = time.process_time()
                distill(student, None, RecordedBatches(batches, Recorded(folder)), self.settings, recorded=True)
        found["seconds"] = time.process_time() - started
        return dataclasses.asdict(compare(student, self.teacher.model, self.held_out)) | found


bench_of = functools.cache(Bench)


def train_one(each: tuple[Row, int], name: str, target: str, out: Path, tokens: int) -> dict[str, Any]:
    """Train the student of a row and a seed."""
    row, seed = each
    bench = bench_of(name, target, out / "start", tokens, seed)
    return bench.train(row, out / "recordings" / f"{row.name.replace(' ', '-')}-{seed}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--to", default="mamba", help="mamba, mamba2 or linear")
    parser.add_argument("--tokens", type=number_of_tokens, default=100_000, help="of each student")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=1)
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=1, help="trainings at once; timings want one")
    parser.add_argument("--out", type=Path, help="runs/offline-teacher/TEACHER-TARGET-TOKENS by default")
    args = parser.parse_args()
    out = args.out or Path("runs/offline-teacher") / f"{resolve(args.teacher).name}-{args.to}-{args.tokens}"
    aligned = Variant(args.to, without=("distill",)).recipe(args.teacher, 10 * ALIGNED, tasks="names")
    report_of(args.teacher, aligned, out / "start")
    file = out / "results.jsonl"
    done = results_of(file)
    wanted = [(row, seed) for seed in range(args.seeds) for row in ROWS if (row, seed) not in done]
    train = functools.partial(train_one, name=args.teacher, target=args.to, out=out, tokens=args.tokens)
    train_all(train, wanted, file, said_of, args.jobs)
    write_text(out / TABLE, "\n".join(show(list(results_of(file).values()))) + "\n")
    console.print(f"The table is in {out / TABLE}.")


def said_of(line: dict[str, Any]) -> str:
    return f"{Row(line['top_k'], line['sample']).name}: perplexity {line['perplexity_student']:.2f}"


def results_of(file: Path) -> dict[tuple[Row, int], dict[str, Any]]:
    """What was trained before."""
    lines = json_lines.read(file)
    return {(Row(line["top_k"], line["sample"]), line["seed"]): line for line in lines}


def show(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Print the table, a row for each kind of recording with the means over seeds; its lines of Markdown."""
    columns = (
        "learns from", "bytes a token", "recorded, tokens/s", "distilled, tokens/s", "perplexity", "ratio",
        "top-1 agreement", "KL, nats",
    )  # fmt: skip
    table, found = Table(*columns, box=box.SIMPLE_HEAD), [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in ROWS:
        same = [line for line in lines if Row(line["top_k"], line["sample"]) == row]
        if not same:
            continue

        def mean(of: Any, same: Sequence[dict[str, Any]] = same) -> float:
            return sum(map(of, same)) / len(same)

        is_recorded = row != Row()
        cells = [
            row.name,
            size(mean(lambda line: line["bytes"] / line["tokens"])) if is_recorded else "",
            f"{mean(lambda line: line['tokens'] / line['seconds_to_record']):,.0f}" if is_recorded else "",
            f"{mean(lambda line: line['tokens'] / line['seconds']):,.0f}",
            f"{mean(lambda line: line['perplexity_student']):.2f}",
            f"{mean(lambda line: line['perplexity_student'] / line['perplexity_teacher']):.3f}",
            f"{mean(lambda line: line['top1']):.1%}",
            f"{mean(lambda line: line['kl_nats']):.3f}",
        ]
        table.add_row(*cells)
        found.append(f"| {' | '.join(cells)} |")
    console.print(table)
    return found


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
