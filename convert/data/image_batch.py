"""A batch of labelled images.

B images · C channels · H height · W width · K classes
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ImageBatch:
    """`images` [B, C, H, W] have values from 0 to 1, before any model's normalisation. `targets` [B, K] are the
    probabilities of the classes: one-hot, or a mixture where images are mixed; all 0 where the label is not known."""

    images: Tensor
    targets: Tensor

    def to(self, device: Any) -> "ImageBatch":
        return ImageBatch(self.images.to(device), self.targets.to(device))

    def parts(self, size: int, at_least: int = 1) -> list["ImageBatch"]:
        """Micro-batches of at most so many images; `at_least` that many, as far as equal numbers of images give
        them."""
        size = min(size, -(-len(self.images) // at_least))
        return [ImageBatch(*part) for part in zip(self.images.split(size), self.targets.split(size), strict=True)]

    @property
    def num_units(self) -> int:
        """What training counts."""
        return len(self.images)

    @property
    def num_targets(self) -> int:
        """Images whose label is known."""
        return int((self.targets.sum(-1) > 0).sum())
