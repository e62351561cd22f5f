"""An image classifier as a model folder that needs nothing of ours: weights, image processor, card, and where
transformers does not have the architecture itself, the code.

B images · C channels · H height · W width · K classes
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.core.console import console
from convert.core.files import write_json
from convert.exporting.code import OURS, code_of, flat
from convert.exporting.hub import NO_CODE, replace_folder, write_weights
from convert.exporting.verify import run_without_us, set_aside
from convert.models.vision.features import logits
from convert.models.vision.inputs import Preprocessing, model_inputs, preprocessing_of

PROCESSOR = "preprocessor_config.json"
BILINEAR = 2  # PIL's number


def export_and_verify(
    student: PreTrainedModel,
    folder: Path,
    *,
    card: str,
    card_without_code: str,
    class_names: Sequence[str],
    images: Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Write `folder`, with the weights in `dtype`, and read it back in a process that does not know this project.

    `card`: the model card of a folder that brings its code along; `card_without_code`: of one that does not. `images`
    [B, C, H, W]: some with values from 0 to 1, on which logits are compared. Returns what report.json says of the
    export."""
    console.print("export", style="bold")
    code = _code(student)
    export(student, folder, card=card if code else card_without_code, class_names=class_names, dtype=dtype)
    found = verify(student, folder, images)
    return found | {"dtype": str(dtype).removeprefix("torch.")}


def export(
    student: PreTrainedModel, folder: Path, *, card: str, class_names: Sequence[str], dtype: torch.dtype | None = None
) -> None:
    """Write `folder`, with the parameters in `dtype` (None: as they are); statistics of batch norms stay as they are,
    and so does the student."""
    config, code = copy.deepcopy(student.config), _code(student)
    config.architectures, config.dtype = [type(student).__name__], dtype or student.dtype
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    if code:
        config.auto_map = _auto_map(student)

    def write(side: Path) -> None:
        for name, source in code.items():
            (side / name).write_text(source, encoding="utf-8")
        (side / NO_CODE).touch()
        (side / "README.md").write_text(card, encoding="utf-8")
        write_json(side / PROCESSOR, processor_config(preprocessing_of(config)))
        config.save_pretrained(side)
        buffers = [name for name, _ in student.named_buffers()]
        write_weights(student, side, dtype, buffers)

    replace_folder(folder, write)


def processor_config(wanted: Preprocessing) -> dict[str, Any]:
    """The preprocessor_config.json by which transformers prepares images as `model_inputs` does: resized to the model's
    size whatever their shape, values from 0 to 1, then normalised. Images are made colours for a model of colours; a
    gray model takes gray ones alone."""
    return {
        "image_processor_type": "ViTImageProcessor",  # the one that does these things and no others
        "do_convert_rgb": wanted.channels == 3,
        "do_resize": True,
        "size": {"height": wanted.height, "width": wanted.width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
    }


def _is_ours(student: PreTrainedModel) -> bool:
    return type(student).__module__.split(".")[0] in OURS


def _code(student: PreTrainedModel) -> dict[str, str]:
    """File name -> source of an architecture of ours; empty for those of transformers."""
    if not _is_ours(student):
        return {}
    return code_of(list(dict.fromkeys((type(student.config).__module__, type(student).__module__))))


def _auto_map(student: PreTrainedModel) -> dict[str, str]:
    kinds = {"AutoConfig": type(student.config), "AutoModelForImageClassification": type(student)}
    return {auto: f"{flat(kind.__module__)}.{kind.__name__}" for auto, kind in kinds.items()}


SCRIPT = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, inputs, outputs, trust = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(
    folder, trust_remote_code=trust == "True", dtype=torch.float32
).eval()
processor = AutoImageProcessor.from_pretrained(folder)
found = torch.load(inputs)
pictures = [Image.fromarray(picture.squeeze(-1).numpy()) for picture in found["pictures"]]
with torch.no_grad():
    logits = model(pixel_values=found["pixel_values"]).logits
torch.save({"logits": logits, "pixel_values": processor(pictures, return_tensors="pt")["pixel_values"]}, outputs)
"""


def verify(student: PreTrainedModel, folder: Path, images: Tensor) -> dict[str, float]:
    """How far the logits of an export are from the student's, in a clean process; more than rounding is an error, and
    so are images that its image processor prepares in another way.

    `images` [B, C, H, W] have values from 0 to 1. Raises RuntimeError, and sets the folder aside, where they differ."""
    pictures = (images * 255).round().to(torch.uint8).cpu()  # what an image processor is given
    images = pictures.to(student.device, torch.float32) / 255
    with torch.no_grad():
        reference, inputs = logits(student, images).float().cpu(), model_inputs(student, images).cpu()
    allowed, wanted = max(1e-4, 1e-5 * reference.abs().max().item()), preprocessing_of(student.config)
    # transformers resizes in 8 bits, along one side after the other; without resizing only float32 rounds
    levels = 1e-3 if images.shape[2:] == (wanted.height, wanted.width) else 1.01
    try:
        found = _in_clean_process(folder, pictures, inputs, _is_ours(student))
        difference = (found["logits"] - reference).abs().max().item()
        if not difference <= allowed:
            raise RuntimeError(
                f"The export must give the same logits in a clean process; they differ by {difference:.2g} (allowed"
                f" {allowed:.2g})."
            )
        scale = 255 * torch.tensor(wanted.std).view(-1, 1, 1)
        pixels = ((found["pixel_values"] - inputs) * scale).abs().max().item()
        if not pixels <= levels:
            raise RuntimeError(
                "The export's image processor must prepare images as the student saw them; they differ by"
                f" {pixels:.2g} of 255 levels (allowed {levels:g})."
            )
    except (RuntimeError, OSError):
        set_aside(folder)
        raise
    return {"max_abs_logit": difference, "allowed": allowed}


def _in_clean_process(folder: Path, pictures: Tensor, pixel_values: Tensor, trust_remote_code: bool) -> Any:
    """The logits [B, K] of prepared images, and pictures [B, C, H, W] of bytes prepared, by a process that has only the
    folder."""
    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place, "inputs.pt"), Path(place, "outputs.pt")
        torch.save({"pictures": pictures.permute(0, 2, 3, 1), "pixel_values": pixel_values}, inputs)
        run_without_us(SCRIPT, str(folder.resolve()), str(inputs), str(outputs), str(trust_remote_code))
        return torch.load(outputs)
