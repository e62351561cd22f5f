"""Loading an image classifier: configuration, preprocessing and weights."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import cached_file

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.fields import shown
from convert.core.network import is_hub_reachable
from convert.models.catalog import Source
from convert.models.devices import check_device
from convert.models.failures import explained
from convert.models.loading import quiet, weight_files
from convert.models.teacher_files import read_json
from convert.models.vision.catalog import CLASSIFIERS, TIMM, is_timm
from convert.models.vision.config_file import config_of
from convert.models.vision.families import known_config, preprocessing_from
from convert.models.vision.inputs import FIELD, preprocessing_of, set_preprocessing
from convert.models.vision.mixer import MlpMixerConfig
from convert.models.vision.timm_models import timm_config
from convert.models.vision.vit_ss2d import ViTSS2DConfig
from convert.models.vision.vmamba import VMambaConfig
from convert.models.weights import check_size, refuse_left_over, refuse_misfits

OURS = {kind.model_type for kind in (MlpMixerConfig, VMambaConfig, ViTSS2DConfig)}
FAMILIES = {*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *OURS}
# what published checkpoints hold beside a classifier: poolers, tokens of masks, and positions that are made anew
UNUSED = re.compile(
    r"(^|\.)(pooler\.|mask_token$)|(position_ids|relative_position_index|relative_coords_table|num_batches_tracked)$"
)


@dataclass(frozen=True)
class ImageTeacher:
    """A loaded classifier, frozen and in eval mode. Its configuration has the preprocessing. `dtype` is that of the
    weights on disk."""

    source: Source
    model: PreTrainedModel
    dtype: torch.dtype


def read_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Configuration of a classifier, with its preprocessing. Known names need no network.

    Raises UserError for a model that is no image classifier of a family that transformers knows."""
    return known_config(source.name) if source.kind == "alias" else _published_config(source)


def _published_config(source: Source) -> PreTrainedConfig:
    """The configuration beside the weights, read as data."""
    local = not (source.is_remote and is_hub_reachable())
    with explained(source):
        raw = _json(source, "config.json", local)
        if _family(raw, source) == TIMM:
            config = timm_config(raw, source.where)
        else:
            config = config_of(raw, f"The config.json of {source.where}")
        if getattr(config, FIELD, None) is None:
            processor = _json(source, "preprocessor_config.json", local)
            set_preprocessing(config, preprocessing_from(processor, config, source.where))
        preprocessing_of(config)
    return config


def family_of(source: Source) -> str:
    """The family of a classifier, which needs none of the packages that reading the rest of its configuration may."""
    if source.kind == "alias":
        return CLASSIFIERS[source.name].family
    with explained(source):
        return _family(_json(source, "config.json", not (source.is_remote and is_hub_reachable())), source)


def _family(raw: dict[str, Any], source: Source) -> str:
    family = TIMM if is_timm(raw) else raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(
            f"A teacher of images is an image classifier of a family that transformers knows; the config.json of"
            f" {source.where} has model_type {shown(family)}."
        )
    return family


def load_teacher(source: Source, *, device: str = "cpu", trust_remote_code: bool = False) -> ImageTeacher:
    """Load a classifier. Raises UserError where its files or the device cannot be used."""
    place = check_device(device)
    if source.kind == "alias" and CLASSIFIERS[source.name].hub is None:
        raise UserError(
            f"A teacher has weights; {source.name} has none that are published. It can be a student; train it, and give"
            " the folder of the run."
        )
    config = _published_config(source)
    local = not (source.is_remote and is_hub_reachable())
    if not source.is_remote:
        manifest.check_model(Path(source.where))
        if files := weight_files(Path(source.where), False):
            check_size(config, files, source.where, AutoModelForImageClassification)
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else a bot of the hub is asked, in public, to convert pickles
    with explained(source), quiet(bars=source.is_remote):
        model, found = AutoModelForImageClassification.from_pretrained(
            source.where, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=local,
        )  # fmt: skip
    refuse_misfits(found, source.where)
    refuse_left_over([name for name in found["unexpected_keys"] if not UNUSED.search(name)], source.where)
    model.requires_grad_(False).to(place).eval()
    return ImageTeacher(source, model, config.dtype or torch.float32)


def _json(source: Source, name: str, local: bool) -> dict[str, Any]:
    """A JSON file beside the weights, as data."""
    file = Path(
        cached_file(source.where, name, local_files_only=local) if source.is_remote else Path(source.where, name)
    )
    if not file.is_file():
        raise UserError(f"A classifier's folder holds {name}; {source.where} has none.")
    return read_json(file)
