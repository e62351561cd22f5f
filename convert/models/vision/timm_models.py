"""Image classifiers of the package timm, which transformers wraps: their config.json read as data, and what they need.

Such a config.json says everything of the images, too, so that no preprocessor_config.json lies beside it.
"""

import importlib
import re
from typing import Annotated, Any, Literal

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig

from convert.core.errors import UserError
from convert.core.fields import Range, require, shown
from convert.models.failures import first_line
from convert.models.vision.catalog import IMAGENET_MEAN, IMAGENET_STD, MOST_CLASSES
from convert.models.vision.config_file import check_numbers
from convert.models.vision.features import logits, stage_shapes
from convert.models.vision.inputs import Preprocessing, set_preprocessing

ARCHITECTURE = re.compile(r"\w+(\.\w+)?", re.ASCII)  # whatever else timm.create_model takes names a hub or a folder
BUILD = re.compile(r"\+(cpu|cu\d+|rocm[\d.]+)$")  # of a torch, for each of which there is a torchvision
READ_ELSEWHERE = {  # arguments of timm.create_model that read other files, or that make no classifier
    "model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "features_only",
}  # fmt: skip
Side = Annotated[int, Range(1, 2**14)]


def timm_config(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """Configuration of a timm model, with its preprocessing, from the config.json of timm or of transformers.

    Raises UserError where that says too little, where timm cannot be imported, and for a model that does not take the
    images or does not show its stages."""
    fields, wanted = timm_fields(raw, where)
    check_installed(where)
    from transformers import TimmWrapperConfig

    config = TimmWrapperConfig.from_dict(fields)  # which has timm's names of ImageNet's classes where there are none
    config.label2id = {name: number for number, name in config.id2label.items()}
    set_preprocessing(config, wanted)
    _check_pass(config, wanted, where)
    return config


def timm_fields(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], Preprocessing]:
    """The part of a config.json that is used, and how images are prepared, as timm.data.resolve_data_config has it.

    Channels, and the size of a model that has one size, become arguments of the model, as in timm itself."""
    of = f"in the config.json of {where}"
    architecture: Any = raw.get("architecture")
    cfg: Any = raw.get("pretrained_cfg")
    arguments: Any = raw.get("model_args") or {}
    if not (isinstance(architecture, str) and ARCHITECTURE.fullmatch(architecture)):
        raise UserError(f"architecture {of} must be the name of a timm model; got {shown(architecture)}.")
    for name, value in (("pretrained_cfg", cfg), ("model_args", arguments)):
        if not isinstance(value, dict):
            raise UserError(f"{name} {of} must be a JSON object; got {shown(value)}. Take the original file.")
    if refused := sorted(READ_ELSEWHERE & arguments.keys()):
        raise UserError(
            f"model_args {of} may say what a model is made of, and nothing of its weights or outputs; it has"
            f" {', '.join(refused)}. Take them out."
        )
    for name, value in arguments.items():
        check_numbers(name, value, f"model_args {of}")
    require(Literal["float64", "float32", "float16", "bfloat16"] | None, raw.get("dtype"), f"dtype {of}")
    classes = raw.get("num_classes", cfg.get("num_classes"))
    require(Annotated[int, Range(2, MOST_CLASSES)], classes, f"num_classes {of}")
    if arguments.get("num_classes", classes) != classes:
        raise UserError(
            f"model_args.num_classes {of} must be its num_classes, {classes:,}; it is"
            f" {shown(arguments['num_classes'])}. Mend that file."
        )
    names: Any = raw.get("label_names")
    require(list[str] | None, names, f"label_names {of}")
    if names is not None and len(names) != classes:
        raise UserError(f"label_names {of} must name each of its {classes:,} classes; it has {len(names):,} names.")
    wanted = _preprocessing(cfg, of)
    if arguments.get("in_chans", wanted.channels) != wanted.channels:
        raise UserError(
            f"pretrained_cfg.input_size {of} must have the channels that the model takes; it has {wanted.channels}, and"
            f" model_args.in_chans is {shown(arguments['in_chans'])}. Mend that file."
        )
    made: dict[str, Any] = {}
    arguments = {name: value for name, value in arguments.items() if name != "num_classes"}  # transformers gives that
    if wanted.channels != 3:
        made["in_chans"] = wanted.channels
    if cfg.get("fixed_input_size"):
        made["img_size"] = (wanted.height, wanted.width)
    fields = {"architecture": architecture, "pretrained_cfg": dict(cfg), "model_args": made | arguments}
    fields |= {"num_classes": classes, "dtype": raw.get("dtype")} | ({} if names is None else {"label_names": names})
    return fields, wanted


def _preprocessing(cfg: dict[str, Any], of: str) -> Preprocessing:
    size: Any = cfg.get("input_size")
    require(list[Side], size, f"pretrained_cfg.input_size {of}")
    if len(size) != 3:
        raise UserError(f"pretrained_cfg.input_size {of} must be channels, height and width; got {shown(size)}.")
    channels, height, width = size
    statistics = []
    for name, of_imagenet in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        values: Any = cfg.get(name)
        values = list(of_imagenet) if values is None else values
        require(list[float], values, f"pretrained_cfg.{name} {of}")
        if len(values) not in (1, channels):
            raise UserError(
                f"pretrained_cfg.{name} {of} must have one number, or one for each channel of input_size, {channels};"
                f" it has {len(values)}. Mend that file."
            )
        statistics.append(tuple(float(value) for value in values) * (channels // len(values)))
    return Preprocessing(height, width, *statistics)


def check_installed(where: str) -> None:
    """Raise UserError where timm, or the torchvision that it needs, cannot be imported."""
    try:
        for name in ("torchvision", "timm"):
            importlib.import_module(name)
    except Exception as error:  # RuntimeError, where a torchvision was made for another torch
        build = BUILD.search(torch.__version__)
        place = f" --index-url https://download.pytorch.org/whl/{build[1]}" if build else ""
        raise UserError(
            f"A model of timm needs the packages timm and torchvision, which must fit torch {torch.__version__};"
            f" {where} is one, and importing them says: {first_line(error)}. pip install torchvision{place}, then"
            " pip install -e '.[timm]'."
        ) from error


def _check_pass(config: PreTrainedConfig, wanted: Preprocessing, where: str) -> None:
    """Make the model without memory, and pass an empty image through it and its stages."""
    shape = (wanted.channels, wanted.height, wanted.width)
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForImageClassification.from_config(config).eval()
            stage_shapes(model)
            found = tuple(logits(model, torch.zeros(1, *shape)).shape)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"A model of timm must take images of the size in its pretrained_cfg, and show the outputs of its stages;"
            f" {config.architecture} in {where} fails with images of {' x '.join(map(str, shape))}"
            f" ({first_line(error)}). Mend config.json, or install a newer timm if this one does not know the model."
        ) from error
    if found != (1, config.num_labels):
        raise UserError(
            f"A classifier gives a logit for each class; {config.architecture} in {where} has {config.num_labels:,}"
            f" classes and outputs of shape {found}."
        )
