"""Students that begin with the weights of a classifier of their family, with a new head where classes differ."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.models.catalog import Source, resolve
from convert.models.vision.catalog import CLASSIFIERS
from convert.models.vision.families import OUTPUTS, StudentOptions
from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.loading import family_of, load_teacher, read_config


def starting_config(name: str, options: StudentOptions, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the student `name` that begins with the weights which `options.start` names, with the teacher's
    classes. "published" are the weights of that known model on the hub.

    Raises UserError where those weights are of another family, or of images of other channels or another size."""
    source, family = _source(name, options), CLASSIFIERS[name].family
    if (found := family_of(source)) != family:
        raise UserError(
            f"A student begins with weights of its family; {name} is a {family}, and {options.start} a {found}."
        )
    config = copy.deepcopy(read_config(source))
    wanted, seen = preprocessing_of(config), preprocessing_of(teacher)
    if wanted.channels < seen.channels:
        raise UserError(
            f"A student must take the channels that its teacher takes; {options.start} takes {wanted.channels}, the"
            f" teacher {seen.channels}."
        )
    if options.image_size not in (None, wanted.height):
        raise UserError(
            f"A student that begins with weights keeps their size of images; {options.start} has {wanted.height}, and"
            f" image_size is {options.image_size}. Leave it out."
        )
    for field in OUTPUTS:
        setattr(config, field, copy.deepcopy(getattr(teacher, field)))
    return config


def started(name: str, options: StudentOptions, config: PreTrainedConfig, empty: PreTrainedModel) -> PreTrainedModel:
    """`empty`, a model of that configuration, with every weight of the start but the head, if its classes are
    others."""
    weights = load_teacher(_source(name, options)).model.state_dict()
    own = empty.state_dict()
    differing = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    if wrong := [key for key in differing if own[key].shape[:1] != torch.Size([config.num_labels])]:
        raise UserError(
            f"The weights of {options.start} must fit the student but for its head; {len(wrong)} tensors do not, first"
            f" {wrong[0]}."
        )
    empty.load_state_dict({key: weights[key] for key in own if key not in differing}, strict=False)
    return empty


def _source(name: str, options: StudentOptions) -> Source:
    source = resolve(name if options.start == "published" else str(options.start))
    if source.domain == "language":
        raise UserError(f"A student of images begins with a classifier's weights; {options.start} is a language model.")
    return source
