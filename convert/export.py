"""The command that writes the student of a run for another engine.

python -m convert.export runs/vit-nano-resnet-nano --format onnx
"""

import argparse
from pathlib import Path

from convert.cli import Parser, heavy_imports, main_of
from convert.core.console import console, size
from convert.core.errors import UserError
from convert.core.places import path_of
from convert.models.catalog import Source, resolve


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.export", description="Write an image classifier for another engine, and check the file."
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher of images")
    parser.add_argument(
        "--format",
        required=True,
        choices=("onnx",),
        help="onnx: one file for onnxruntime; images of the model's size with values from 0 to 1 go in, logits out",
    )
    parser.add_argument("--out", help="the file; default model.onnx in the run folder, or NAME.onnx here")
    return main_of(parser, export, argv)


def export(args: argparse.Namespace) -> None:
    """Refuse what cannot be exported, then load, write and check."""
    source = resolve(args.folder)
    if source.domain == "language":
        raise UserError(
            f"ONNX files are made of image classifiers; {args.folder} is a language model, and its folder is what"
            " engines for text load."
        )
    file, run = _place(args, source)
    with heavy_imports():
        from convert.exporting.onnx import OPSET, check_installed, export_onnx

    check_installed()
    with heavy_imports():
        from convert.core import manifest
        from convert.models.vision.loading import load_teacher
        from convert.runs.ledger import locked

    model = load_teacher(source).model
    if run is None:
        difference = export_onnx(model, file)
    else:
        with locked(run), manifest.renewing(run, file.name):
            difference = export_onnx(model, file)
    console.print(
        f"{file} ({size(file.stat().st_size)}, opset {OPSET}): in a process with onnxruntime alone its logits differ by"
        f" at most {difference:.1g} of the largest.",
        highlight=False,
    )


def _place(args: argparse.Namespace, source: Source) -> tuple[Path, Path | None]:
    """The file to write, and the run's folder where it is the run's own file, which a later export replaces."""
    if args.out is None and source.kind == "run":
        run = path_of(args.folder, "The folder")
        return run / "model.onnx", run
    file = path_of(args.out or f"{source.name}.onnx", "--out")
    if file.suffix != ".onnx":
        raise UserError(f"An ONNX file is named so; --out must end in .onnx, and got {str(file)!r}.")
    if file.exists():
        raise UserError(f"An export replaces no file but a run's own; {file} is there. Move it away, or give --out.")
    if not file.parent.is_dir():
        raise UserError(f"A file is written into a folder that exists; there is no {file.parent}. Make it first.")
    return file, None


if __name__ == "__main__":
    raise SystemExit(main())
