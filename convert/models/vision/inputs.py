"""What an image classifier expects of its images. It is kept in the model's configuration, so that a model is whole
without a file beside it, and two models can be shown the same image, each in its own way.

B images · C channels · H height · W width
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Range

FIELD = "preprocessing"  # of a configuration


@dataclass(frozen=True)
class Preprocessing(Checked):
    """Size, and mean and standard deviation of each channel, of images whose values are from 0 to 1."""

    height: Annotated[int, Range(1, 2**14)]
    width: Annotated[int, Range(1, 2**14)]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise UserError(
                f"Each channel of images needs a mean and a deviation above 0; got {self.mean} and {self.std}."
            )

    @property
    def channels(self) -> int:
        return len(self.mean)


def set_preprocessing(config: PreTrainedConfig, preprocessing: Preprocessing) -> None:
    """Keep it in a model's configuration."""
    fields = {"height": preprocessing.height, "width": preprocessing.width}
    setattr(config, FIELD, fields | {"mean": list(preprocessing.mean), "std": list(preprocessing.std)})


def preprocessing_of(config: PreTrainedConfig) -> Preprocessing:
    """What a configuration keeps. Raises UserError where it keeps nothing that can be used."""
    kept: Any = getattr(config, FIELD, None)
    if not isinstance(kept, Mapping):
        raise UserError(
            f"A classifier's configuration must say how images are prepared; this {config.model_type}'s does not."
        )
    try:
        mean, std = (tuple(float(value) for value in kept[name]) for name in ("mean", "std"))
        return Preprocessing(kept["height"], kept["width"], mean, std)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"A configuration's {FIELD} must have height, width, mean and std; this {config.model_type}'s is {kept!r}."
        ) from None


def model_inputs(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Images [B, C, H, W] with values from 0 to 1, as this model expects them: its size, its mean and deviation."""
    images, wanted = of_its_size(model, images), preprocessing_of(model.config)
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
    return (images - mean) / std


def of_its_size(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Images [B, C, H, W], of the channels and size that this model takes.

    Gray images are repeated for a model of colours. Raises UserError for colours where the model takes gray."""
    wanted = preprocessing_of(model.config)
    if images.shape[1] != wanted.channels:
        if images.shape[1] != 1:
            raise UserError(
                f"A model must take the channels that images have; these have {images.shape[1]}, and"
                f" {model.config.model_type} takes {wanted.channels}."
            )
        images = images.expand(-1, wanted.channels, -1, -1)
    if images.shape[2:] != (wanted.height, wanted.width):
        images = interpolate(images, (wanted.height, wanted.width), mode="bilinear", antialias=True)
    return images
