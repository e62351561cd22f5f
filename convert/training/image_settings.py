"""The settings of a stage that trains an image classifier."""

from dataclasses import dataclass
from typing import Annotated, Literal

from convert.core.fields import Range
from convert.data.augmentation import Augmentation
from convert.training.settings import StageSettings


@dataclass(frozen=True, kw_only=True)
class ImageSettings(StageSettings, Augmentation):
    """The settings of one stage on images, how they are augmented included. Sizes are in images."""

    unit, abbreviation = "images", "img"

    images: Annotated[int, Range(0, 1e12)]  # seen in all, each as often as it comes round
    batch_images: Annotated[int, Range(1, 2**20)]
    micro_images: Annotated[int, Range(1, 2**20)]  # of one forward and backward; batch norms see that many
    labels: Annotated[float, Range(1e-6, 1)] = 1.0  # share of the training images whose label is known, by class
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Range(0, 0.9999)] = 0.9  # of sgd
    # decay of a moving average of the weights, which is what the student has in the end; 0: none
    ema: Annotated[float, Range(0, 0.9999999)] = 0.0

    @property
    def units(self) -> int:
        return self.images

    @property
    def batch_units(self) -> int:
        return self.batch_images

    @property
    def micro_units(self) -> int:
        return self.micro_images

    @property
    def is_batch_own(self) -> bool:
        """Augmentation draws from torch's global generator, which recomputed layers and checkpoints use, too."""
        return self.is_off
