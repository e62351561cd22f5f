"""Is a ViT better turned into scans over places layer by layer, or by a VMamba that learns from it as a whole?

    python -m experiments.vit_ss2d                            # digits, three seeds; resumable
    python -m experiments.vit_ss2d --data fashion-mnist --teacher vit-nano-fashion-mnist

The attention of the teacher becomes SS2D of the same width, and its mixers learn on the teacher's own inputs first, or
only with the whole model; a VMamba of about its size learns by One-for-All; and the same ViT with SS2D learns from
labels alone, with random weights. All see as many images. Every training is a line of results.jsonl; table.md has mean
and spread of the seeds, and the processor's time of a training."""

import argparse
import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from transformers import AutoModelForImageClassification, PreTrainedModel

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core import json_lines
from convert.core.console import console
from convert.core.console import count as in_short
from convert.core.files import write_text
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.image_sets import image_set
from convert.data.images import ImageData, read_images
from convert.evaluation.classification import predict
from convert.evaluation.efficiency import cost
from convert.models.catalog import resolve
from convert.models.vision.families import StudentOptions, student_config
from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.loading import load_teacher
from convert.objectives import Objective
from convert.recipes.vision import Budget, one_for_all, to_vit_ss2d
from convert.steps.swap_ss2d import SwapSS2D
from convert.steps.train_images import STAGES
from convert.training.image_settings import ImageSettings
from experiments.trainings import CORES, mean_and_spread, train_all

FORCED, AT_ONCE = "SS2D, teacher-forced first", "SS2D, whole model from the start"
VMAMBA, ALONE = "VMamba, One-for-All", "SS2D, labels alone"
WAYS = (FORCED, AT_ONCE, VMAMBA, ALONE)
TABLE = "table.md"


@dataclass(frozen=True)
class Training:
    """One student: how it is made, and with which seed."""

    way: str
    seed: int


def stages_of(way: str, images: int, seed: int) -> list[tuple[str, ImageSettings]]:
    """The stages of a way with their settings: those of the recipes, with all images in one stage where one is left."""
    budget = Budget(images, 64, is_small=True, seed=seed)
    if way in (VMAMBA, ALONE):
        settings = one_for_all(budget, "vmamba").trainings[-1]
        assert isinstance(settings, ImageSettings)
        alone = {"objective": Objective.of("cross_entropy")} if way == ALONE else {}
        return [("classify", dataclasses.replace(settings, evaluate_every=0, **alone))]
    align, distill = (
        dataclasses.replace(settings, evaluate_every=0)
        for settings in to_vit_ss2d(budget).trainings
        if isinstance(settings, ImageSettings)
    )
    if way == FORCED:
        return [("align", align), ("classify", distill)]
    return [("classify", dataclasses.replace(distill, images=images))]


def student_of(way: str, teacher: PreTrainedModel) -> PreTrainedModel:
    """A student before it is trained."""
    if way == VMAMBA:
        config = student_config("vmamba", StudentOptions(), teacher.config)
        return AutoModelForImageClassification.from_config(config)
    swap = SwapSS2D("swap")
    student = AutoModelForImageClassification.from_config(swap.config(teacher.config))
    return student if way == ALONE else swap.started(student, teacher)


def train_one(training: Training, name: str, spec: str, images: int) -> dict[str, Any]:
    """Train and measure one student."""
    teacher = load_teacher(resolve(name)).model
    data, before, measured = read(teacher, spec), time.process_time(), {}
    torch.manual_seed(training.seed)
    student = student_of(training.way, teacher)
    for stage, settings in stages_of(training.way, images, training.seed):
        batches = ImageBatches(data.train, len(data.class_names), settings.batch_images, training.seed, settings)
        STAGES[stage](student, teacher, batches, settings)
        measured[stage] = accuracy(student, data)
    seconds = time.process_time() - before
    return dataclasses.asdict(training) | {
        "accuracy": measured["classify"],
        "after_align": measured.get("align"),
        "seconds": seconds,
    }


def read(teacher: PreTrainedModel, spec: str) -> ImageData:
    """The images, as large as the teacher sees them."""
    wanted = preprocessing_of(teacher.config)
    return read_images(image_set(spec), size=(wanted.height, wanted.width))


def accuracy(model: PreTrainedModel, data: ImageData) -> float:
    return float(predict(model, held_out_images(data, 500, len(data.held_out))).is_right.mean())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--teacher", default="vit-nano", help="a ViT that knows the classes of the data")
    parser.add_argument("--images", default="20k", help="seen in training by each student")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=CORES, help="trainings at once")
    parser.add_argument("--out", type=Path, help="runs/vit-ss2d/DATA-IMAGES by default")
    args = parser.parse_args()
    images = number_of_tokens(args.images)
    out = args.out or Path("runs/vit-ss2d") / f"{args.data}-{images}"
    file = out / "results.jsonl"
    wanted = [Training(way, seed) for seed in range(args.seeds) for way in WAYS]
    done = results_of(file)
    train = functools.partial(train_one, name=args.teacher, spec=args.data, images=images)
    train_all(train, [each for each in wanted if each not in done], file, said_of, args.jobs)
    torch.set_num_threads(1)  # times are those of one thread
    teacher = load_teacher(resolve(args.teacher)).model
    write_text(out / TABLE, show(results_of(file), teacher, accuracy(teacher, read(teacher, args.data))))
    console.print(f"The table is in {out / TABLE}.", highlight=False)


def said_of(row: dict[str, Any]) -> str:
    return f"{row['way']}: {row['accuracy']:.1%}"


def results_of(file: Path) -> dict[Training, dict[str, Any]]:
    """What was trained before."""
    return {Training(row["way"], row["seed"]): row for row in json_lines.read(file)}


def show(found: dict[Training, dict[str, Any]], teacher: PreTrainedModel, of_teacher: float) -> str:
    """Print the table; its lines of Markdown."""
    columns = ("model", "parameters", "MACs", "after alignment", "accuracy", "training, s")
    table, lines = (
        Table(*columns, box=box.SIMPLE_HEAD),
        ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"],
    )
    costs = cost(teacher)
    rows = [("the teacher", in_short(costs.parameters), in_short(costs.macs), "", f"{100 * of_teacher:.1f}", "")]
    for way in WAYS:
        of_way = [row for training, row in found.items() if training.way == way]
        costs = cost(student_of(way, teacher).eval())
        cells = [_spread([row[field] for row in of_way]) for field in ("after_align", "accuracy")]
        seconds = f"{np.mean([row['seconds'] for row in of_way]):.0f}" if of_way else ""
        rows.append((way, in_short(costs.parameters), in_short(costs.macs), *cells, seconds))
    for cells in rows:
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console.print(table)
    return "\n".join([*lines, ""])


def _spread(shares: list[float | None]) -> str:
    known = [100 * share for share in shares if share is not None]
    return mean_and_spread(known) if known else ""


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
