"""The config.json of a stranger's image classifier, checked before a model is made of it. Nothing in it is believed
further than the record and the bounds here say; they are ours, several times beyond the largest published model."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import CONFIG_MAPPING

from convert.core.errors import UserError
from convert.core.fields import Range, shown
from convert.models.teacher_files import check_fields
from convert.models.vision.catalog import MOST_CLASSES
from convert.models.vision.inputs import FIELD, preprocessing_of

MOST_LAYERS = 1000
LAYERS = (
    "num_hidden_layers", "depths", "depth", "num_layers", "n_layer", "num_block_repeats", "stage_num_blocks",
    "stage_numb_of_layers", "n_attn_blocks", "num_encoder_blocks",
)  # fmt: skip
LARGEST_NUMBER = 2**20  # of any kind: token ids are the largest that are published
DEEPEST = 5  # lists in lists
# entries of every classifier, beside those of its family
COMMON = ("id2label", "label2id", "num_labels", "architectures", "dtype", "torch_dtype", "problem_type", FIELD)
Width = Annotated[int, Range(1, 2**17)]
Side = Annotated[int, Range(1, 2**14)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Facts:
    """The entries that mean the same in many families; each may be missing."""

    num_channels: Annotated[int, Range(1, 2**10)]
    image_size: Side | list[Side]
    patch_size: Side | list[Side]
    hidden_size: Width
    intermediate_size: Annotated[int, Range(1, 2**20)]
    num_hidden_layers: Annotated[int, Range(1, MOST_LAYERS)]
    num_attention_heads: Annotated[int, Range(1, 2**12)] | list[Annotated[int, Range(1, 2**12)]]
    hidden_sizes: list[Width]
    depths: list[Annotated[int, Range(1, MOST_LAYERS)]]
    hidden_act: Literal[tuple(ACT2FN)]  # type: ignore[valid-type]
    layer_norm_eps: Share
    initializer_range: Share
    hidden_dropout_prob: Share
    attention_probs_dropout_prob: Share
    num_labels: Annotated[int, Range(2, MOST_CLASSES)]
    id2label: dict[str, str] | None
    label2id: dict[str, int] | None
    architectures: list[str] | None
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None
    torch_dtype: Literal["float64", "float32", "float16", "bfloat16"] | None
    preprocessing: dict[str, Any] | None


def config_of(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """The configuration of a classifier's config.json, whose model_type is one that transformers knows. Entries that
    the family does not have are left out. Makes the model without memory.

    Raises UserError at what no model can be made of, or the exception of whatever fails."""
    family = raw["model_type"]
    known = {*inspect.signature(CONFIG_MAPPING[family].__init__).parameters, *COMMON} - {"self", "kwargs"}
    entries = {name: copy.deepcopy(raw[name]) for name in raw if name in known}
    check_fields(entries, Facts, where)
    for name, value in entries.items():
        check_numbers(name, value, where)
    _check_labels(entries, where)
    config = AutoConfig.for_model(family, **entries)
    if not 2 <= config.num_labels <= MOST_CLASSES:
        raise UserError(f"{where}: a classifier has two classes or more; this one has {config.num_labels}.")
    if getattr(config, FIELD, None) is not None:
        preprocessing_of(config)
    with torch.device("meta"):
        AutoModelForImageClassification.from_config(copy.deepcopy(config))
    return config


def check_numbers(name: str, value: Any, where: str) -> None:
    """Raises UserError where an entry holds a number that is not finite or too large, or more layers than there are in
    any model."""
    if isinstance(value, dict):
        if name not in ("id2label", "label2id", FIELD):
            for key, each in value.items():
                check_numbers(key, each, f"{where}: {name}")
        return
    numbers = list(_numbers(value, 0, f"{where}: {name}"))
    if any(not math.isfinite(number) or abs(number) > LARGEST_NUMBER for number in numbers):
        raise UserError(f"{where}: {name} must be finite and at most {LARGEST_NUMBER:,}; got {shown(value)}.")
    if name in LAYERS and sum(abs(number) for number in numbers) > MOST_LAYERS:
        raise UserError(f"{where}: {name} must be of at most {MOST_LAYERS:,} layers; got {shown(value)}.")


def _numbers(value: Any, depth: int, where: str) -> Iterator[float]:
    if depth > DEEPEST:
        raise UserError(f"{where} must be lists of at most {DEEPEST} levels. Take the original file.")
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each, depth + 1, where)
    elif isinstance(value, int | float):
        yield value


def _check_labels(entries: dict[str, Any], where: str) -> None:
    """Raises UserError where the names of classes are not those of 0 to K - 1."""
    names = entries.get("id2label")
    if names is None:
        return
    if sorted(names) != sorted(str(i) for i in range(len(names))):
        raise UserError(
            f"{where}: id2label must name the classes 0 to {len(names) - 1}, each once; it has {shown(list(names))}."
        )
    if entries.get("num_labels", len(names)) != len(names):
        raise UserError(
            f"{where}: num_labels must be the number of names in id2label, {len(names)}; it is {entries['num_labels']}."
        )
