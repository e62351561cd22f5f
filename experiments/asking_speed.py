"""How much faster are questions answered in batches than one by one, and are the scores the same?

    python -m experiments.asking_speed neox-nano

The same questions, by the same readers; a batch of one against the batches of an evaluation. Reading is the time of the
passes over prompts, which give the first token of every answer, too; writing is all the rest. A processor that reads at
its full rate one by one does not read faster in batches: that bounds the whole."""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from tqdm import tqdm

from convert.cli import fail_in_words, whole_number
from convert.core.console import console
from convert.core.errors import UserError
from convert.evaluation.runner import chosen
from convert.evaluation.scoring import BATCH_ROWS, by_generation, fits
from convert.evaluation.tasks import Item, Task
from convert.models.loading import Teacher, load_teacher


@dataclass
class Asked:
    """`seconds` for all `answers`, of which `reading` the prompts; `written`: tokens after the first of each answer."""

    answers: int = 0
    seconds: float = 0.0
    reading: float = 0.0
    written: int = 0
    right: int = 0
    texts: tuple[str, ...] = ()

    def __add__(self, other: "Asked") -> "Asked":
        return Asked(*(getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)))


def ask(loaded: Teacher, task: Task, items: list[Item], rows: int) -> Asked:
    reading = 0.0

    def begins(module, args, kwargs) -> None:
        nonlocal reading
        reading -= time.perf_counter() if kwargs["input_ids"].shape[1] > 1 else 0

    def ends(module, args, kwargs, output) -> None:
        nonlocal reading
        reading += time.perf_counter() if kwargs["input_ids"].shape[1] > 1 else 0

    hooks = [
        loaded.model.register_forward_pre_hook(begins, with_kwargs=True),
        loaded.model.register_forward_hook(ends, with_kwargs=True),
    ]
    started = time.perf_counter()
    answers = [
        answer for batch in by_generation(loaded.model, loaded.tokenizer, task, items, rows=rows) for answer in batch
    ]
    seconds = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    answers.sort(key=lambda answer: answer.item)
    written = sum(max(0, len(answer.tokens) - 1) for answer in answers)
    return Asked(len(answers), seconds, reading, written, sum(a.right for a in answers), tuple(a.text for a in answers))


def rows_of(name: str, alone: Asked, batched: Asked) -> Iterator[list[str]]:
    numbers = [(a.answers / a.seconds, a.reading, a.written / (a.seconds - a.reading)) for a in (alone, batched)]
    differ = sum(a != b for a, b in zip(alone.texts, batched.texts, strict=True))
    for how, asked, row, other in zip(
        ("one by one", "in batches"), (alone, batched), numbers, ("", str(differ)), strict=True
    ):
        yield [name, how, f"{row[0]:.1f}", f"{row[1]:.2f}", f"{row[2]:,.0f}", str(asked.right), other]
    (answers, reading, writing), batches = numbers
    faster = f"{batches[2] / writing:.1f}" if writing else ""  # answers of one token are read off the prompt
    yield ["", "times as fast", f"{batches[0] / answers:.1f}", f"{reading / batches[1]:.1f}", faster, "", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=48, help="questions of each task")
    args = parser.parse_args()
    loaded = load_teacher(args.model)
    table = Table("task", "asked", title=f"{args.model}, by generation", title_justify="left")
    for column in ("answers/s", "reading, s", "writing, tokens/s", "right", "texts that differ"):
        table.add_column(column, justify="right")
    whole = {rows: Asked() for rows in (1, BATCH_ROWS)}
    for task in tqdm(chosen(args.tasks, loaded.tokenizer), unit="task"):
        items = task.items(args.limit, 0)
        items = [items[i] for i in fits(loaded.model, loaded.tokenizer, task, items)]
        if not items:
            continue  # too long for this model
        if whole[1].answers == 0:
            ask(loaded, task, items[:1], 1)  # what is done once
        alone, batched = (ask(loaded, task, items, rows) for rows in whole)
        for rows, asked in ((1, alone), (BATCH_ROWS, batched)):
            whole[rows] += asked
        for row in rows_of(task.name, alone, batched):
            table.add_row(*row)
    alone = whole[1]
    if not alone.answers:
        raise UserError(f"No question of these tasks fits {args.model}. Give others with --tasks.")
    for row in rows_of("all", alone, whole[BATCH_ROWS]):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    print(
        f"If batches wrote in no time and read as one by one, they would be {alone.seconds / alone.reading:.1f} times"
        " as fast."
    )


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
