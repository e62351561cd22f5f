"""How much faster do models answer in batches than one by one, and are the scores the same?

    python -m experiments.generation_throughput neox-nano

The same examples by the same decoder: batches of one against the batches of an evaluation. Prefill is the time of the
passes over prompts, which give the first token of every answer, too; decoding is all the rest. A processor that runs
prompts at its full rate one by one is not faster at them in batches: that bounds the whole."""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from convert.cli import fail_in_words, whole_number
from convert.core.console import console
from convert.core.errors import UserError
from convert.evaluation.runner import chosen
from convert.evaluation.scoring import BATCH_ROWS, by_generation, fitting
from convert.evaluation.tasks import Item, Task
from convert.models.loading import Teacher, load_teacher


@dataclass
class Answered:
    """`seconds` for all `answers`, of which `prefill` went into the prompts; `decoded`: tokens after the first of each
    answer."""

    answers: int = 0
    seconds: float = 0.0
    prefill: float = 0.0
    decoded: int = 0
    correct: int = 0
    texts: tuple[str, ...] = ()

    def __add__(self, other: "Answered") -> "Answered":
        return Answered(*(getattr(self, field.name) + getattr(other, field.name) for field in dataclasses.fields(self)))


def answer(loaded: Teacher, task: Task, items: list[Item], rows: int) -> Answered:
    """Answer these items in batches of at most `rows`, and measure it."""
    prefill = 0.0

    def is_prefill(args: tuple[torch.Tensor, ...]) -> bool:
        return args[0].shape[1] > 1

    def begins(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        nonlocal prefill
        prefill -= time.perf_counter() if is_prefill(args) else 0

    def ends(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal prefill
        prefill += time.perf_counter() if is_prefill(args) else 0

    hooks = [
        loaded.model.register_forward_pre_hook(begins, with_kwargs=True),
        loaded.model.register_forward_hook(ends, with_kwargs=True),
    ]
    started = time.perf_counter()
    answers = [a for batch in by_generation(loaded.model, loaded.tokenizer, task, items, rows=rows) for a in batch]
    seconds = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    answers.sort(key=lambda a: a.item)
    decoded = sum(max(0, len(a.tokens) - 1) for a in answers)
    correct = sum(a.correct for a in answers)
    return Answered(len(answers), seconds, prefill, decoded, correct, tuple(a.text for a in answers))


def rows_of(name: str, alone: Answered, batched: Answered) -> Iterator[list[str]]:
    """Rows of the table: one by one, in batches, and how many times as fast."""
    numbers = [(a.answers / a.seconds, a.prefill, a.decoded / (a.seconds - a.prefill)) for a in (alone, batched)]
    differ = sum(a != b for a, b in zip(alone.texts, batched.texts, strict=True))
    for how, answered, row, other in zip(
        ("one by one", "in batches"), (alone, batched), numbers, ("", str(differ)), strict=True
    ):
        yield [name, how, f"{row[0]:.1f}", f"{row[1]:.2f}", f"{row[2]:,.0f}", str(answered.correct), other]
    (answers, prefill, decoding), batches = numbers
    faster = f"{batches[2] / decoding:.1f}" if decoding else ""  # answers of one token are read off the prompt
    yield ["", "times as fast", f"{batches[0] / answers:.1f}", f"{prefill / batches[1]:.1f}", faster, "", ""]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=48, help="examples of each task")
    args = parser.parse_args()
    loaded = load_teacher(args.model)
    table = Table("task", "prompted", title=f"{args.model}, by generation", title_justify="left")
    for column in ("answers/s", "prefill, s", "decoding, tokens/s", "correct", "texts that differ"):
        table.add_column(column, justify="right")
    whole = {rows: Answered() for rows in (1, BATCH_ROWS)}
    for task in tqdm(chosen(args.tasks, loaded.tokenizer), unit="task"):
        items = task.items(args.limit, 0)
        items = [items[i] for i in fitting(loaded.model, loaded.tokenizer, task, items)]
        if not items:
            continue  # too long for this model
        if whole[1].answers == 0:
            answer(loaded, task, items[:1], 1)  # what is done once
        alone, batched = (answer(loaded, task, items, rows) for rows in whole)
        for rows, answered in ((1, alone), (BATCH_ROWS, batched)):
            whole[rows] += answered
        for row in rows_of(task.name, alone, batched):
            table.add_row(*row)
    alone = whole[1]
    if not alone.answers:
        raise UserError(f"No example of these tasks fits {args.model}. Give others with --tasks.")
    for row in rows_of("all", alone, whole[BATCH_ROWS]):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    print(
        "If batches decoded in no time and ran their prompts as one by one, they would be"
        f" {alone.seconds / alone.prefill:.1f} times as fast."
    )


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
