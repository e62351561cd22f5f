"""An image classifier as one ONNX file, checked by onnxruntime in a process that has nothing else.

B images · C channels · H height · W width · K classes
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.exporting.verify import run_without_us
from convert.models.vision.inputs import preprocessing_of

OPSET = 18  # the one that torch's exporter writes without converting
NEEDED = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**24  # bytes of weights: protobuf holds 2 GiB
BATCHES = (1, 3)  # images at once in the check
TOLERANCE = 1e-4  # of logits, relative to the largest


class _WithPreprocessing(nn.Module):
    """A classifier that normalises images [B, C, H, W] with values from 0 to 1 itself, and returns logits [B, K]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, wanted = model, preprocessing_of(model.config)
        self.register_buffer("mean", torch.tensor(wanted.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(wanted.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=(images - self.mean) / self.std).logits


def check_installed() -> None:
    """Raise UserError where a package is missing that makes or checks ONNX files."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"An ONNX file needs {', '.join(NEEDED)}; missing: {', '.join(missing)}. pip install -e '.[onnx]'."
        )


def export_onnx(model: PreTrainedModel, file: Path) -> float:
    """Write a classifier on the CPU, in float32 and eval mode, as the ONNX file `file`, which it replaces; return the
    largest difference of a logit, relative to the largest logit.

    Its input `images` [B, C, H, W] has the model's size and values from 0 to 1, its output `logits` is [B, K]; B is any
    number. The file is written beside `file`, and takes its place once onnxruntime gives the same logits. Raises
    UserError for a model that torch cannot export, RuntimeError where logits differ."""
    check_installed()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weights > LARGEST:
        raise UserError(
            f"An ONNX file holds weights of at most {LARGEST:,} bytes; this {model.config.model_type} has {weights:,}."
            " Export a smaller student."
        )
    side = file.with_name(file.name + ".writing")
    try:
        _write(_WithPreprocessing(model).eval(), side)
        difference = verify(model, side)
        side.replace(file)
    finally:
        side.unlink(missing_ok=True)
    return difference


def _write(model: _WithPreprocessing, file: Path) -> None:
    config, wanted = model.model.config, preprocessing_of(model.model.config)
    names = [str((config.id2label or {}).get(number, number)) for number in range(config.num_labels)]
    shape = f"[batch, {wanted.channels}, {wanted.height}, {wanted.width}]"
    about = {"class_names": json.dumps(names), "input": f"images {shape}, values from 0 to 1"}
    example = torch.zeros(2, wanted.channels, wanted.height, wanted.width)
    with _eager(model.model):
        write_program(model, example, file, config.model_type, about=about)


def write_program(
    model: nn.Module,
    example: Tensor,
    file: Path,
    name: str,
    output: str = "logits",
    about: dict[str, str] | None = None,
) -> None:
    """Write a module in eval mode, of one input `images` [B, ...] as `example` is, and one `output` [B, ...], as an
    ONNX file for any B. `about` goes into its metadata. Raises UserError, with the `name`, where torch cannot export
    it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass  # of onnxscript

    with _quiet():
        try:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise UserError(
                f"torch must be able to export a model as ONNX; it cannot export this {name}: {reason}. Use the folder"
                " model/ instead."
            ) from error
        ClearMetadataAndDocStringPass()(program.model)  # lines and paths of this machine's code, for every operator
        program.model.metadata_props.update(about or {})
        program.save(file, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter, and the optimiser that it asks, say of themselves."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Have attention computed as matrix products, which every family can be exported with: torch cannot take apart the
    fused operator after the windows of a Swin."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# Only what is named here can be imported: an ONNX file must run where there is neither torch nor transformers
ANSWERS = """
import importlib.abc

class OnlyThese(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "numpy", "onnxruntime"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, OnlyThese())
import numpy, onnxruntime

file, inputs, outputs = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
found = numpy.load(inputs)
answers = {name: session.run(None, {"images": found[name]})[0] for name in found}
assert not {"torch", "transformers", "onnx"} & set(sys.modules)
numpy.savez(outputs, **answers)
"""


def answers(file: Path, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """What onnxruntime says to named batches of images, in a process that has it and numpy alone."""
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place, "images.npz"), Path(place, "answers.npz")
        np.savez(inputs, **{name: some.numpy() for name, some in images.items()})
        run_without_us(ANSWERS, str(file.resolve()), str(inputs), str(outputs))
        return {name: torch.from_numpy(found) for name, found in np.load(outputs).items()}


def verify(model: PreTrainedModel, file: Path) -> float:
    """How far onnxruntime's logits of random images are from the model's, alone and three at once, relative to the
    largest. Raises RuntimeError where it is more than 1e-4."""
    wanted = preprocessing_of(model.config)
    return compare(_WithPreprocessing(model), file, (wanted.channels, wanted.height, wanted.width))


def compare(model: nn.Module, file: Path, shape: tuple[int, ...]) -> float:
    """The same for any module of images [B, *shape]."""
    g, worst = torch.Generator().manual_seed(0), 0.0
    images = {str(count): torch.rand(count, *shape, generator=g) for count in BATCHES}
    found = answers(file, images)
    for name, some in images.items():
        with torch.no_grad():
            expected = model(some)
        worst = max(worst, ((found[name] - expected).abs().max() / expected.abs().max()).item())
        if not worst <= TOLERANCE:
            raise RuntimeError(
                f"An ONNX file must give the model's logits; those of {name} images differ by {worst:.2g} of the"
                f" largest (allowed {TOLERANCE:g})."
            )
    return worst
