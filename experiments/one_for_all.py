"""Which distillation works between architectures? ("One-for-All", arXiv 2310.19444: a CNN, a ViT and an MLP-Mixer teach
each other, with all labels and with a tenth of them.)

    python -m experiments.one_for_all                             # digits, three seeds: resumable, under an hour
    python -m experiments.one_for_all --data fashion-mnist        # hours
    python -m experiments.one_for_all --labels 0.1 --seeds 1      # a part of it

Nine pairs, five methods. A student without a teacher learns from the labelled images alone; the others learn from all
images, those without a label by the teacher. Every training is a line of results.jsonl with the held-out images it had
right, so that methods are compared on the same seeds and images."""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from convert.cli import fail_in_words, number_of_tokens, real_number, whole_number
from convert.core import json_lines
from convert.core.console import console
from convert.core.files import write_text
from convert.data.image_batches import held_out_images
from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.domains.vision import Vision
from convert.evaluation.classification import predict
from convert.evaluation.pairs import difference
from convert.models.vision.families import StudentOptions
from convert.models.vision.inputs import preprocessing_of
from convert.objectives import Objective
from convert.recipes import vision as recipes
from convert.training.images import classify
from experiments.trainings import CORES, mean_and_spread, train_all

MODELS = ("resnet-nano", "vit-nano", "mixer-nano")
DATA = ("digits", "fashion-mnist")
SCRATCH, OFA = "scratch", "OFA"
METHODS = {
    SCRATCH: "cross_entropy",
    "KD": "cross_entropy + forward_kl(temperature=4)",
    "FitNet": "cross_entropy + hints",
    "DIST": "cross_entropy + dist",
    OFA: "cross_entropy + one_for_all",
}
TABLE = "table.md"


@dataclass(frozen=True)
class Training:
    """One student: `teacher` is "" without one."""

    teacher: str
    student: str
    method: str
    labels: float
    seed: int


def trainings(labels: list[float], seeds: int, methods: list[str]) -> Iterator[Training]:
    """All of them, the first seed first."""
    for seed in range(seeds):
        for share in labels:
            for student in MODELS:
                if SCRATCH in methods:
                    yield Training("", student, SCRATCH, share, seed)
                for teacher in MODELS:
                    for method in methods:
                        if method != SCRATCH:
                            yield Training(teacher, student, method, share, seed)


class Bench:
    """The teachers and images that trainings share."""

    def __init__(self, data: str, images: int) -> None:
        self.spec, self.images, self.domain = data, images, Vision()
        suffix = "" if data == "digits" else f"-{data}"
        self.teachers = {
            name: self.domain.load_teacher(self.domain.resolve(name + suffix), "cpu", False) for name in MODELS
        }

    def train(self, training: Training) -> dict[str, Any]:
        """Train the student: the line of the results. Whoever teaches it, its images have the same size."""
        started = time.monotonic()
        size = preprocessing_of(self.teachers[training.student].model.config).height
        teacher = self.teachers[training.teacher or training.student]
        budget = recipes.budget(
            training.student, teacher.model.config, images=self.images, labels=training.labels, seed=training.seed
        )
        _, train = recipes.one_for_all(budget, training.student).steps
        objective = Objective.of(METHODS[training.method])
        settings = dataclasses.replace(train.settings, objective=objective, evaluate_every=0)
        data = read_images(image_set(self.spec), labels=settings.labels, seed=settings.seed)
        torch.manual_seed(training.seed)
        student = self.domain.build(training.student, StudentOptions(image_size=size), teacher)
        classify(student, teacher.model if training.teacher else None, self.domain.batches(data, settings), settings)
        right = predict(student, held_out_images(data, 500, len(data.held_out))).is_right
        return dataclasses.asdict(training) | {
            "accuracy": float(right.mean()),
            "seconds": time.monotonic() - started,
            "right": "".join("01"[int(each)] for each in right),
        }


bench_of = functools.cache(Bench)


def train_one(training: Training, data: str, images: int) -> dict[str, Any]:
    return bench_of(data, images).train(training)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--images", default="40k", help="seen in training by each student")
    parser.add_argument("--labels", type=real_number(1e-6, 1), nargs="+", default=[0.1, 1.0], help="shares of labels")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=CORES, help="trainings at once")
    parser.add_argument("--out", type=Path, help="runs/one-for-all/DATA-IMAGES by default")
    args = parser.parse_args()
    images = number_of_tokens(args.images)
    out = args.out or Path("runs/one-for-all") / f"{args.data}-{images}"
    file = out / "results.jsonl"
    done = results_of(file)
    wanted = [training for training in trainings(args.labels, args.seeds, args.methods) if training not in done]
    train_all(functools.partial(train_one, data=args.data, images=images), wanted, file, said_of, args.jobs)
    found = results_of(file)
    lines = [line for share in args.labels for line in show(found, share)]
    write_text(out / TABLE, "\n".join(lines) + "\n")
    console.print(f"The table is in {out / TABLE}.")


def said_of(row: dict[str, Any]) -> str:
    return f"{row['teacher'] or 'no teacher'} -> {row['student']}, {row['method']}: {row['accuracy']:.1%}"


def results_of(file: Path) -> dict[Training, NDArray]:
    """What was trained before."""
    names = [field.name for field in dataclasses.fields(Training)]
    rows = json_lines.read(file)
    return {Training(**{name: row[name] for name in names}): np.array([c == "1" for c in row["right"]]) for row in rows}


def by_seed(found: dict[Training, NDArray], teacher: str, student: str, method: str, labels: float) -> NDArray:
    """[S, N] of the seeds that were trained."""
    same = [
        (training.seed, right)
        for training, right in found.items()
        if (training.teacher, training.student, training.method, training.labels)
        == ("" if method == SCRATCH else teacher, student, method, labels)
    ]
    return np.array([right for _, right in sorted(same, key=lambda pair: pair[0])])


def show(found: dict[Training, NDArray], labels: float) -> list[str]:
    """Print the table of one share of labels; its lines of Markdown. Accuracy is in percent: mean and spread (largest
    minus smallest) of the seeds. A star: no method is better beyond the interval of the difference."""
    methods = [method for method in METHODS if any(training.method == method for training in found)]
    table = Table("teacher", "student", *methods, box=box.SIMPLE_HEAD, title=f"{labels:.0%} of the labels")
    lines = [f"## {labels:.0%} of the labels", "", "| teacher | student | " + " | ".join(methods) + " |"]
    lines.append("|---" * (len(methods) + 2) + "|")
    good = pairs = 0
    for student in MODELS:
        for teacher in MODELS:
            cells = {method: by_seed(found, teacher, student, method, labels) for method in methods}
            if any(not len(cell) for cell in cells.values()):
                continue
            best = max(methods, key=lambda method: cells[method].mean())
            at_best = [method for method in methods if method == best or not is_better(cells[best], cells[method])]
            pairs, good = pairs + 1, good + (OFA in at_best)
            texts = [in_words(cells[method]) + " *" * (method in at_best) for method in methods]
            table.add_row(teacher, student, *texts)
            lines.append(f"| {teacher} | {student} | " + " | ".join(texts) + " |")
    console.print(table)
    if OFA in methods and pairs:
        line = f"OFA is best, or not surely worse than the best, in {good} of {pairs} pairs."
        console.print(line, highlight=False)
        lines += ["", line]
    return [*lines, ""]


def is_better(a: NDArray, b: NDArray) -> bool:
    """Whether [S, N] is better than the same seeds and images of another method, beyond the 95 % interval."""
    seeds = min(len(a), len(b))
    return difference({"class": a[:seeds].astype(float)}, {"class": b[:seeds].astype(float)}).sign > 0


def in_words(right: NDArray) -> str:
    return mean_and_spread(100 * right.mean(1))


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
