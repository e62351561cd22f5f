"""What do image classifiers cost on one thread of a CPU? In PyTorch, as an ONNX file, and in 8 bits.

    python -m experiments.edge runs/vit-nano-vmamba runs/vit-nano-vmamba-vmamba-lowrank

Bytes, milliseconds for one image, and accuracy on the held-out images of each run's data. Files of 8 bits are made by
onnxruntime's quantiser, which sees 128 training images."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from convert.cli import fail_in_words
from convert.core.console import console, size
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.data.image_batches import held_out_images
from convert.data.image_sets import image_set
from convert.data.images import ImageData, read_images
from convert.domains.vision import Vision
from convert.evaluation.classification import predict
from convert.evaluation.efficiency import cost
from convert.exporting.onnx import check_installed, export_onnx
from convert.exporting.onnx_int8 import latency_ms, quantise, session_of
from convert.models.vision.inputs import of_its_size, preprocessing_of
from convert.runs import records

CALIBRATION = 128  # images (ours)
COLUMNS = ("run", "as", "size", "ms an image", "accuracy")


def rows_of(run: Path, place: Path) -> list[tuple[str, ...]]:
    """The rows of one run: its student in PyTorch, as ONNX and in 8 bits."""
    report = records.report(run)
    if report.domain != "vision":
        raise UserError(f"This compares image classifiers; {run} is a run of a language model.")
    domain = Vision()
    model = domain.load_teacher(domain.resolve(str(run)), "cpu", False).model
    wanted = preprocessing_of(model.config)
    data = read_images(image_set(report.settings.data), size=(wanted.height, wanted.width))
    held_out = held_out_images(data, 500, len(data.held_out))
    right = predict(model, held_out).is_right
    of_torch = cost(model)
    rows = [(run.name, "PyTorch", size(of_torch.weight_bytes), f"{of_torch.latency_ms:.2f}", f"{right.mean():.1%}")]
    plain, int8 = place / "model.onnx", place / "int8.onnx"
    export_onnx(model, plain)
    quantise(plain, int8, _calibration(model, data))
    for file, name in ((plain, "ONNX"), (int8, "ONNX, 8 bits")):
        session = session_of(file)
        correct, images = 0, 0
        for batch in held_out:
            inputs = of_its_size(model, batch.images).numpy()
            (logits,) = session.run(None, {"images": inputs})
            correct += int((logits.argmax(-1) == batch.targets.argmax(-1).numpy()).sum())
            images += len(inputs)
        rows.append(
            (
                run.name,
                name,
                size(file.stat().st_size),
                f"{latency_ms(session, inputs[:1]):.2f}",
                f"{correct / images:.1%}",
            )
        )
    return rows


def _calibration(model: Any, data: ImageData) -> list[NDArray]:
    """Training images, spread over the set, one by one."""
    chosen = np.linspace(0, len(data.train) - 1, min(CALIBRATION, len(data.train))).astype(np.int64)
    return [of_its_size(model, data.train.read([i]).float() / 255).numpy() for i in chosen]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs of images")
    parser.add_argument("--out", type=Path, default=Path("runs/edge.md"))
    args = parser.parse_args()
    check_installed()
    torch.set_num_threads(1)
    table, lines = Table(*COLUMNS, box=box.SIMPLE_HEAD), [" | ".join(("", *COLUMNS, "")).strip(), "|---" * 5 + "|"]
    for run in args.runs:
        with tempfile.TemporaryDirectory() as place:
            for row in rows_of(run, Path(place)):
                table.add_row(*row)
                lines.append(" | ".join(("", *row, "")).strip())
    console.print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, "\n".join(lines) + "\n")
    console.print(f"The table is in {args.out}.", highlight=False)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
