"""Configurations of image classifiers: those of known models, and those of students for a teacher's images."""

import copy
from dataclasses import dataclass
from typing import Annotated, Any

from transformers import AutoConfig, PreTrainedConfig

from convert.core.errors import UserError
from convert.core.fields import Checked, Range, Text, require
from convert.models.vision import mixer, vit_ss2d, vmamba  # noqa: F401  # transformers knows all three by them
from convert.models.vision.catalog import CLASSIFIERS, IMAGENET_MEAN, IMAGENET_STD, KnownClassifier
from convert.models.vision.inputs import Preprocessing, preprocessing_of, set_preprocessing

CLASSES = 1000  # of ImageNet
OUTPUTS = ("id2label", "label2id")


@dataclass(frozen=True)
class StudentOptions(Checked):
    """What a student begins with. `start`: the weights of a classifier, by whatever names a teacher, or "published",
    with a new head where its classes are others; None: random weights. `image_size`: side of its images; None: what the
    model needs, or what the teacher sees."""

    start: Text | None = None
    image_size: Annotated[int, Range(4, 4096)] | None = None


def known_config(name: str) -> PreTrainedConfig:
    """Configuration of a published model with the inputs and outputs that it was trained with."""
    known = CLASSIFIERS[name]
    return _config(known, known.size or 224, 3, {"num_labels": CLASSES})


def student_config(name: str, options: StudentOptions, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of a student with random weights, with the teacher's classes and channels.

    Raises UserError for a model that is not known, and for a size of images that it cannot take."""
    require(StudentOptions, options, "The options of a student")
    if name not in CLASSIFIERS:
        raise UserError(f"A student is one of {', '.join(CLASSIFIERS)}; there is no {name!r}.")
    known, seen = CLASSIFIERS[name], preprocessing_of(teacher)
    side = options.image_size or known.size or max(seen.height, seen.width, known.least)
    patch = known.fields.get("patch_size", 1)
    if side % patch:
        raise UserError(
            f"The side of images must be a multiple of a student's patches; {name} has patches of {patch}, and the"
            f" images {side}. Set image_size."
        )
    outputs = {field: copy.deepcopy(getattr(teacher, field)) for field in OUTPUTS}
    return _config(known, side, seen.channels, outputs)


def _config(known: KnownClassifier, side: int, channels: int, outputs: dict[str, Any]) -> PreTrainedConfig:
    config = AutoConfig.for_model(
        known.family, **copy.deepcopy(known.fields), image_size=side, num_channels=channels, **outputs
    )
    mean, std = (_per_channel(values, channels) for values in (known.mean, known.std))
    set_preprocessing(config, Preprocessing(side, side, mean, std))
    return config


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics of so many channels: those of colours, or their mean in each channel where there are others."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def preprocessing_from(processor: dict[str, Any], config: PreTrainedConfig, where: str) -> Preprocessing:
    """What the preprocessor_config.json of a published model says, in every form that transformers has had.

    Raises UserError where it says too little."""
    size: Any = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    size = size or processor.get("size") or getattr(config, "image_size", None)
    sides = size if isinstance(size, dict) else {"height": size, "width": size}
    edge = sides.get("shortest_edge")
    height: Any = sides.get("height", edge)
    width: Any = sides.get("width", edge)
    if isinstance(height, list) and len(height) == 2:
        height, width = height
    channels = getattr(config, "num_channels", 3)
    mean: Any = processor.get("image_mean", IMAGENET_MEAN)
    std: Any = processor.get("image_std", IMAGENET_STD)
    if not processor.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    try:
        found = Preprocessing(int(height), int(width), *(tuple(float(v) for v in values) for values in (mean, std)))
    except (TypeError, ValueError):
        raise UserError(
            f"The preprocessor_config.json of {where} must say how large images are, and their mean and deviation;"
            f" it has size {size!r}, image_mean {mean!r}, image_std {std!r}."
        ) from None
    if found.channels != channels:
        raise UserError(
            f"The model in {where} takes {channels} channels, and its preprocessor_config.json normalises"
            f" {found.channels}. Mend that file."
        )
    return found
