"""How much faster are questions answered in batches than one by one, and are the scores the same?

    python -m experiments.asking_speed neox-nano

The same questions, by the same readers; a batch of one against the batches of an evaluation.
"""

import argparse
import time

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from convert.errors import UserError
from convert.evaluation import chosen
from convert.readings import BATCH_ROWS, Answer, by_generation, fits
from convert.run import fail_in_words
from convert.teachers import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=int, default=48, help="questions of each task")
    args = parser.parse_args()
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1; got {args.limit}.")
    loaded = load_teacher(args.model)
    table = Table("task", title=f"{args.model}, answers a second by generation", title_justify="left")
    for column in ("one by one", "in batches", "times", "right, one by one", "in batches", "texts that differ"):
        table.add_column(column, justify="right")
    seconds: dict[int, float] = {1: 0.0, BATCH_ROWS: 0.0}
    for task in tqdm(chosen(args.tasks, loaded.tokenizer), unit="task"):
        items = task.items(args.limit, 0)
        items = [items[i] for i in fits(loaded.model, loaded.tokenizer, task, items)]
        found: dict[int, list[Answer]] = {}
        took = {}
        for rows in (BATCH_ROWS, 1):
            started = time.perf_counter()
            answers = [answer for batch in by_generation(loaded.model, loaded.tokenizer, task, items, rows=rows) for answer in batch]
            took[rows] = time.perf_counter() - started
            seconds[rows] += took[rows]
            found[rows] = sorted(answers, key=lambda answer: answer.item)
        right = [sum(answer.right for answer in found[rows]) for rows in (1, BATCH_ROWS)]
        differ = sum(a.text != b.text for a, b in zip(found[1], found[BATCH_ROWS], strict=True))
        rates = [f"{len(items) / took[rows]:.1f}" for rows in (1, BATCH_ROWS)]
        table.add_row(task.name, *rates, f"{took[1] / took[BATCH_ROWS]:.1f}", *map(str, right), str(differ))
    table.add_row("all", "", "", f"{seconds[1] / seconds[BATCH_ROWS]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
