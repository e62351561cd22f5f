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

    def pin_memory(self) -> "ImageBatch":
        """The batch in memory from which a GPU copies by itself."""
        return ImageBatch(self.images.pin_memory(), self.targets.pin_memory())

    def to(self, device: Any) -> "ImageBatch":
        """The batch on a device, which is not waited for where this one is pinned."""
        tensors = self.images, self.targets
        return ImageBatch(*(t.to(device, non_blocking=self.images.is_pinned()) for t in tensors))

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
