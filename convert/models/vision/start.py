"""Students that begin with the weights of a classifier of their family, with a new head where classes differ."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.models.catalog import Source, resolve
from convert.models.vision.catalog import CLASSIFIERS
from convert.models.vision.families import OUTPUTS, StudentOptions, known_config
from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.loading import family_of, load_teacher, read_config
from convert.models.vision.vmamba import VMambaConfig
from convert.models.vision.vmamba_published import from_published, read_published
from convert.models.weights import refuse_left_over


def starting_config(name: str, options: StudentOptions, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the student `name` that begins with the weights which `options.start` names, with the teacher's
    classes. "published" are the weights of that known model on the hub.

    Raises UserError where those weights are of another family, or of images of other channels or another size."""
    family = CLASSIFIERS[name].family
    file = _published_file(options)
    found = VMambaConfig.model_type if file else family_of(_source(name, options))
    if found != family:
        raise UserError(
            f"A student begins with weights of its family; {name} is a {family}, and {options.start} a {found}."
        )
    config = known_config(name) if file else copy.deepcopy(read_config(_source(name, options)))
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
    file = _published_file(options)
    weights = (
        from_published(read_published(file), empty) if file else load_teacher(_source(name, options)).model.state_dict()
    )
    own = empty.state_dict()
    differing = [key for key in own if key not in weights or weights[key].shape != own[key].shape]
    if wrong := [key for key in differing if own[key].shape[:1] != torch.Size([config.num_labels])]:
        raise UserError(
            f"The weights of {options.start} must fit the student but for its head; {len(wrong)} tensors do not, first"
            f" {wrong[0]}."
        )
    if file:
        refuse_left_over(sorted(weights.keys() - own.keys()), str(file))
    empty.load_state_dict({key: weights[key] for key in own if key not in differing}, strict=False)
    return empty


def _published_file(options: StudentOptions) -> Path | None:
    """The file of a published VMamba, where the start is one."""
    file = Path(str(options.start)).expanduser()
    if file.suffix != ".pth":
        return None
    if not file.is_file():
        raise UserError(f"There is no checkpoint {file}. Give the file that the authors of VMamba published.")
    return file


def _source(name: str, options: StudentOptions) -> Source:
    source = resolve(name if options.start == "published" else str(options.start))
    if source.domain == "language":
        raise UserError(f"A student of images begins with a classifier's weights; {options.start} is a language model.")
    return source
