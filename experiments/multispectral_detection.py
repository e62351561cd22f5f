"""How small can a detector for two bands become? (DLRMamba, arXiv 2603.06920: tables IV and VII in our setting.)

    python -m experiments.multispectral_detection                            # scenes of scanned digits, three seeds
    python -m experiments.multispectral_detection --objects digits fashion-mnist
    python -m experiments.multispectral_detection --pairs FOLDER     # real pairs, see experiments/detection/folder.py

A VMamba sees a visible and an infrared image fused, and a head without anchors finds the objects. Students of low rank
keep a share of the numbers of the backbone's matrices; distilled ones start from a teacher of full rank and learn its
transitions, states and features beside the task. Every detector is a line of results.jsonl; table.md has mean and
spread of the seeds, found.png what the smallest distilled one finds, report.html both. Size is that of the
weights, time that of one image on one thread, by onnxruntime."""

import argparse
import copy
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
from tqdm import tqdm

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core import json_lines
from convert.core.console import console, size
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.exporting.onnx import check_installed
from convert.models.vision.catalog import NANO_VMAMBA
from convert.models.vision.vmamba_lowrank import low_rank_config, start_from
from experiments.detection import precision
from experiments.detection.detector import Detector, backbone_config
from experiments.detection.folder import read_pairs
from experiments.detection.pictures import draw
from experiments.detection.report import page
from experiments.detection.scenes import Pairs, compose
from experiments.detection.training import found_by, on_the_edge, train
from experiments.trainings import CORES, keep_weights, mean_and_spread, train_all

SIDE, SCENES, HELD_OUT = 64, 4000, 500  # pixels, and scenes that are composed (ours)
SVD, STATES, FEATURES = "0.5*transition_svd", "0.1*scan_states", "1.5*stage_features"  # the paper's weights, eq. 9
ALL = " + ".join((SVD, STATES, FEATURES))
DISTILLED, TUNED = "low rank 0.50, distilled", "low rank 0.50, distilled, then tuned"
TABLE = "table.md"
SAID = "mAP50 in percent: mean and spread of the seeds; in 8 bits of seed 0. Time is that of one image on one thread."


@dataclass(frozen=True)
class Row:
    """One detector. `ratio`: of the numbers of the backbone's matrices, None for VMamba's own scan. `teacher`: the name
    of the row that it starts from; `terms`: what it learns from that one beside the task."""

    name: str
    ratio: float | None = None
    bands: str = "both"
    teacher: str = ""
    terms: str = ""


FULL = "dense transitions, full rank"
ROWS = (
    Row("VMamba, visible alone", bands="visible"),
    Row("VMamba, infrared alone", bands="infrared"),
    Row("VMamba, both bands"),
    Row(FULL, 1.0),
    Row(f"{FULL}, then tuned", 1.0, teacher=FULL),  # as long as those that start from it
    *(Row(f"low rank {ratio:.2f}, random start", ratio) for ratio in (0.65, 0.60, 0.55, 0.50)),
    Row("low rank 0.50, SVD start", 0.5, teacher=FULL),
    Row("low rank 0.50, SVD start, transitions", 0.5, teacher=FULL, terms=SVD),
    Row("low rank 0.50, SVD start, states", 0.5, teacher=FULL, terms=STATES),
    Row("low rank 0.50, SVD start, features", 0.5, teacher=FULL, terms=FEATURES),
    Row(DISTILLED, 0.5, teacher=FULL, terms=ALL),
    Row(TUNED, 0.5, teacher=DISTILLED),
)
NAMES = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Scenes:
    """What detectors learn from: sets of objects to compose scenes of, or a folder of real pairs."""

    objects: tuple[str, ...]
    folder: Path | None

    def read(self) -> tuple[Pairs, Pairs]:
        """Training and held-out pairs, which share no object."""
        if self.folder is not None:
            train, held_out = (read_pairs(self.folder, split, SIDE) for split in ("train", "val"))
            if train.class_names != held_out.class_names:
                raise UserError(
                    f"train.json and val.json must have the same categories; those in {self.folder} have"
                    f" {', '.join(train.class_names)} and {', '.join(held_out.class_names)}."
                )
            return train, held_out
        sets = [read_images(image_set(name)) for name in self.objects]
        names = tuple(name for each in sets for name in each.class_names)
        train = compose([each.train for each in sets], names, SCENES, seed=0, side=SIDE)
        return train, compose([each.held_out for each in sets], names, HELD_OUT, seed=1, side=SIDE)


# --- one detector


def detector_of(row: Row, classes: int, teacher: Detector | None) -> Detector:
    """The detector of a row before it is trained: random, or the nearest of its rank to the teacher."""
    if teacher is None:
        sizes = NANO_VMAMBA | ({} if row.ratio is None else {"rank_ratio": row.ratio})
        return Detector(backbone_config(SIDE, sizes), classes, row.bands)
    if row.ratio == teacher.config.rank_ratio:
        return copy.deepcopy(teacher)
    made = Detector(low_rank_config(teacher.config, row.ratio, None), classes, row.bands)
    start_from(made.backbone, teacher.backbone)
    rest = {name: value for name, value in teacher.state_dict().items() if not name.startswith("backbone.")}
    made.load_state_dict(rest, strict=False)
    return made


# --- many


@dataclass(frozen=True)
class Training:
    """A row with a seed, as results.jsonl has it."""

    row: str
    seed: int


read_once = functools.cache(Scenes.read)


def train_one(training: Training, scenes: Scenes, images: int, out: Path) -> dict[str, Any]:
    """Train and measure one detector; its weights are kept for those that start from it."""
    row, (pairs, held_out) = NAMES[training.row], read_once(scenes)
    teacher = load(out, Training(row.teacher, training.seed), len(pairs.class_names)) if row.teacher else None
    torch.manual_seed(training.seed)
    detector = detector_of(row, len(pairs.class_names), teacher)
    started = time.monotonic()
    train(detector, teacher, row.terms, pairs, images, training.seed)
    seconds = time.monotonic() - started
    keep_weights(detector, weights_of(out, training))
    found = found_by(detector, held_out)
    return dataclasses.asdict(training) | {
        "map50": precision.map50(found, held_out),
        "parameters": sum(p.numel() for p in detector.parameters()),
        "seconds": seconds,
    }


def weights_of(out: Path, training: Training) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in training.row)
    return out / "detectors" / f"{name}-{training.seed}.safetensors"


def load(out: Path, training: Training, classes: int) -> Detector:
    """A detector that was trained, in eval mode. Its configuration is that of its row."""
    row = NAMES[training.row]
    sizes = NANO_VMAMBA | ({} if row.ratio is None else {"rank_ratio": row.ratio})
    detector = Detector(backbone_config(SIDE, sizes), classes, row.bands)
    detector.load_state_dict(load_file(weights_of(out, training)))
    return detector.eval()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", nargs="+", choices=("digits", "fashion-mnist"), default=["digits"])
    parser.add_argument("--pairs", type=Path, help="a folder of real pairs instead of composed scenes")
    parser.add_argument("--images", default="16k", help="seen in training by each detector")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=CORES, help="trainings at once")
    parser.add_argument("--out", type=Path, help="runs/multispectral-detection/DATA-IMAGES by default")
    args = parser.parse_args()
    precision.check_installed()
    check_installed()
    images = number_of_tokens(args.images)
    scenes = Scenes(tuple(dict.fromkeys(args.objects)), args.pairs)
    named = "-".join(scenes.objects) if args.pairs is None else args.pairs.name
    out = args.out or Path("runs/multispectral-detection") / f"{named}-{images}"
    pairs, held_out = scenes.read()  # what is wrong with them is said before any training
    file = out / "results.jsonl"
    for wave in waves():
        done = results_of(file)
        wanted = [Training(row.name, seed) for seed in range(args.seeds) for row in wave]
        task = functools.partial(train_one, scenes=scenes, images=images, out=out)
        train_all(task, [each for each in wanted if each not in done], file, said_of, args.jobs)
    torch.set_num_threads(1)  # times are those of one thread
    classes = len(pairs.class_names)
    bar = tqdm(ROWS, desc="as ONNX files", unit="detector", dynamic_ncols=True)
    costs = {row.name: on_the_edge(load(out, Training(row.name, 0), classes), pairs, held_out) for row in bar}
    rows = rows_of(results_of(file), costs)
    write_text(out / TABLE, show(rows))
    found = found_by(load(out, Training(DISTILLED, 0), classes), held_out)
    draw(held_out, found, out / "found.png")
    lead = f"Scenes of {', '.join(scenes.objects) if args.pairs is None else named}, {images:,} seen in training.", SAID
    write_text(out / "report.html", page(rows, lead, DISTILLED, held_out, found))
    console.print(f"The table is in {out / TABLE}, with pictures in {out / 'report.html'}.", highlight=False)


def waves() -> list[list[Row]]:
    """The rows in groups: those of a group start from rows of earlier groups alone."""
    found: list[list[Row]] = []
    while (known := {row.name for group in found for row in group}) != set(NAMES):
        found.append([row for row in ROWS if row.name not in known and row.teacher in {"", *known}])
    return found


def said_of(row: dict[str, Any]) -> str:
    return f"{row['row']}: mAP50 {row['map50']:.1%}"


def results_of(file: Path) -> dict[Training, dict[str, Any]]:
    """What was trained before."""
    return {Training(row["row"], row["seed"]): row for row in json_lines.read(file)}


def rows_of(found: dict[Training, dict[str, Any]], costs: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """The table, its head first."""
    rows = [("detector", "parameters", "mAP50", "ONNX", "ms", "8 bits", "ms", "mAP50")]
    for row in ROWS:
        of_row = [value for training, value in found.items() if training.row == row.name]
        scores, cost = [100 * value["map50"] for value in of_row], costs[row.name]
        cells = (
            row.name,
            f"{of_row[0]['parameters']:,}",
            mean_and_spread(scores),
            size(int(cost["bytes"])),
            f"{cost['ms']:.1f}",
            size(int(cost["int8_bytes"])),
            f"{cost['int8_ms']:.1f}",
            f"{100 * cost['int8_map50']:.1f}",
        )
        rows.append(cells)
    return rows


def show(rows: list[tuple[str, ...]]) -> str:
    """Print the table; its lines of Markdown."""
    columns, *others = rows
    table, lines = Table(*columns, box=box.SIMPLE_HEAD), ["| " + " | ".join(columns) + " |", "|---" * 8 + "|"]
    for cells in others:
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console.print(table)
    console.print(SAID, highlight=False)
    return "\n".join([*lines, "", SAID, ""])


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
