"""How much of a VMamba can be left out, and which terms of DLRMamba bring it back? (arXiv 2603.06920)

    python -m experiments.low_rank                            # digits, three seeds; resumable
    python -m experiments.low_rank --data fashion-mnist

A VMamba of dense transitions and full rank learns from labels. Students of low rank start from its singular vectors and
learn from labels alone, with each term, and with all. Beside them stand the teacher trained as much longer as they are,
and VMamba's own scan, whose decays are diagonal.
Every training is a line of results.jsonl; table.md has mean and spread of the seeds. Bytes are those of the weights,
time that of one image on one thread."""

import argparse
import dataclasses
import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core import json_lines
from convert.core.console import console, size
from convert.core.files import write_text
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.evaluation.classification import predict
from convert.evaluation.efficiency import cost
from convert.models.vision.catalog import CLASSIFIERS
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.models.vision.vmamba import VMambaConfig, VMambaForImageClassification
from convert.models.vision.vmamba_lowrank import low_rank_config, start_from
from convert.objectives import Objective
from convert.training.image_settings import ImageSettings
from convert.training.images import classify
from experiments.trainings import CORES, keep_weights, mean_and_spread, train_all

DATA = ("digits", "fashion-mnist")
RATIOS = (0.65, 0.60, 0.55, 0.50)  # the paper's, table IV
LABELS = "labels alone"
TERMS = {  # with the paper's weights, eq. 9
    LABELS: "cross_entropy",
    "+ transitions": "cross_entropy + 0.5*transition_svd",
    "+ states": "cross_entropy + 0.1*scan_states",
    "+ features": "cross_entropy + 1.5*stage_features",
    "all": "cross_entropy + 0.5*transition_svd + 0.1*scan_states + 1.5*stage_features",
}
DIAGONAL, FULL, TUNED = "VMamba, diagonal decays", "dense transitions, full rank", "trained on"
RATE, OF_STUDENTS = 3e-3, 1e-3  # ours: from random weights, and from a teacher's
TABLE = "table.md"


@dataclass(frozen=True)
class Training:
    """One model: without a ratio VMamba's own, with 1 the teacher, below it a student of these terms; with the terms
    TUNED the teacher, trained as long again as a student is."""

    ratio: float | None
    terms: str
    seed: int

    @property
    def name(self) -> str:
        if self.ratio is None or self.ratio == 1:
            return DIAGONAL if self.ratio is None else FULL + f", {TUNED}" * (self.terms == TUNED)
        return f"{self.ratio:.2f}, {self.terms}"


def waves(seeds: int) -> list[list[Training]]:
    """All trainings: those that learn from labels alone, then those that start from a teacher."""
    random = [Training(ratio, LABELS, seed) for seed in range(seeds) for ratio in (None, 1.0)]
    students = [(ratio, terms) for ratio in RATIOS for terms in TERMS] + [(1.0, TUNED)]
    return [random, [Training(ratio, terms, seed) for seed in range(seeds) for ratio, terms in students]]


def random_model(data: Any, ratio: float | None) -> VMambaForImageClassification:
    """A VMamba with random weights for these images."""
    known = CLASSIFIERS["vmamba"]
    side, half = max(known.least, *data.size), (0.5,) * data.channels
    fields = known.fields | ({} if ratio is None else {"rank_ratio": ratio})
    config = VMambaConfig(image_size=side, num_channels=data.channels, num_labels=len(data.class_names), **fields)
    set_preprocessing(config, Preprocessing(side, side, half, half))
    return VMambaForImageClassification(config)


def train_one(training: Training, spec: str, images: int, out: Path) -> dict[str, Any]:
    """Train and measure one model; the weights of teachers are kept."""
    data = read_images(image_set(spec))
    torch.manual_seed(training.seed)
    student, teacher, rate = random_model(data, training.ratio), None, RATE
    if training.terms == TUNED:
        student.load_state_dict(load_file(weights_of(out, training.seed)))
        rate = OF_STUDENTS
    elif training.ratio is not None and training.ratio < 1:
        teacher, rate = random_model(data, 1.0), OF_STUDENTS
        teacher.load_state_dict(load_file(weights_of(out, training.seed)))
        teacher.requires_grad_(False).eval()
        student = VMambaForImageClassification(low_rank_config(teacher.config, training.ratio, None))
        start_from(student, teacher)
    settings = ImageSettings(
        images=images, batch_images=64, micro_images=64, lr=rate, trains="everything", seed=training.seed,
        objective=Objective.of(TERMS.get(training.terms, "cross_entropy")), schedule="cosine", weight_decay=0.05,
        beta2=0.999, clip=5.0, crop=1, warmup=0.1, precision="float32",
    )  # fmt: skip
    started = time.monotonic()
    classify(student, teacher, ImageBatches(data.train, len(data.class_names), 64, training.seed, settings), settings)
    seconds = time.monotonic() - started
    if training.name == FULL:
        keep_weights(student, weights_of(out, training.seed))
    right = predict(student, held_out_images(data, 500, len(data.held_out))).is_right
    return dataclasses.asdict(training) | {"accuracy": float(right.mean()), "seconds": seconds}


def weights_of(out: Path, seed: int) -> Path:
    return out / f"teacher-{seed}.safetensors"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--images", default="20k", help="seen in training by each model")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=CORES, help="trainings at once")
    parser.add_argument("--out", type=Path, help="runs/low-rank/DATA-IMAGES by default")
    args = parser.parse_args()
    images = number_of_tokens(args.images)
    out = args.out or Path("runs/low-rank") / f"{args.data}-{images}"
    file = out / "results.jsonl"
    train = functools.partial(train_one, spec=args.data, images=images, out=out)
    for wave in waves(args.seeds):
        done = results_of(file)
        train_all(train, [training for training in wave if training not in done], file, said_of, args.jobs)
    torch.set_num_threads(1)  # times are those of one thread
    write_text(out / TABLE, show(results_of(file), args.data))
    console.print(f"The table is in {out / TABLE}.", highlight=False)


def said_of(row: dict[str, Any]) -> str:
    return f"{Training(row['ratio'], row['terms'], row['seed']).name}: {row['accuracy']:.1%}"


def results_of(file: Path) -> dict[Training, float]:
    """The accuracy of what was trained before."""
    return {Training(row["ratio"], row["terms"], row["seed"]): row["accuracy"] for row in json_lines.read(file)}


def show(found: dict[Training, float], spec: str) -> str:
    """Print the table; its lines of Markdown."""
    data = read_images(image_set(spec))
    columns = ("model", "weights", "ms an image", *TERMS)
    table, lines = Table(*columns, box=box.SIMPLE_HEAD), ["| " + " | ".join(columns) + " |"]
    lines.append("|---" * len(columns) + "|")
    for ratio, first in ((None, LABELS), (1.0, LABELS), (1.0, TUNED), *((ratio, LABELS) for ratio in RATIOS)):
        of_model = cost(random_model(data, ratio).eval())
        cells = []
        for terms in (first, *list(TERMS)[1:]):
            scores = [100 * each for run, each in found.items() if run.ratio == ratio and run.terms == terms]
            cells.append(mean_and_spread(scores) if scores else "")
        name = f"rank ratio {ratio:.2f}" if ratio in RATIOS else Training(ratio, first, 0).name
        row = (name, size(of_model.weight_bytes), f"{of_model.latency_ms:.1f}", *cells)
        table.add_row(*row)
        lines.append("| " + " | ".join(row) + " |")
    console.print(table)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
