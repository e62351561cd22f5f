"""Images -> batches. A batch is a function of (seed, step), so a resumed run sees the same data.

B images · C channels · H height · W width · K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from convert.core.errors import UserError
from convert.core.fields import Range, check, checked
from convert.data.augmentation import Augmentation, Augmenter
from convert.data.image_batch import ImageBatch
from convert.data.images import ImageData, Images


@dataclass(frozen=True)
class ImageBatches:
    """`batches(step)`: the batch of one step, augmented, in an order drawn anew for each epoch. It depends on the seed
    and the step alone, whatever was asked before and whatever else draws random numbers.

    `num_classes` may be larger than the labels need, but not smaller. Targets are all 0 where a label is not known."""

    images: Images
    num_classes: Annotated[int, Range(2, 2**24)]
    batch_size: Annotated[int, Range(1, 2**20)]
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    augmentation: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        check(self)
        if not len(self.images):
            raise UserError("Training needs images; the data has none. Give another set.")
        if (largest := int(self.images.labels.max())) >= self.num_classes:
            raise UserError(
                f"Labels must be below the number of classes; there are {self.num_classes:,} classes and a label"
                f" {largest:,}. Give data of the model's classes."
            )

    @checked
    def __call__(self, step: Annotated[int, Range(0, 2**53)]) -> ImageBatch:
        count = len(self.images)
        indices = []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            indices.append(int(_epoch_order(count, self.seed, i // count)[i % count]))
        batch = _batch(self.images, indices, self.num_classes)
        return ImageBatch(*self._augmenter(batch.images, batch.targets, (self.seed, step)))

    @cached_property
    def _augmenter(self) -> Augmenter:
        return Augmenter(self.augmentation)


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@checked
def held_out_images(
    data: ImageData,
    batch_size: Annotated[int, Range(1, 2**20)],
    limit: Annotated[int, Range(1, 2**53)],
) -> list[ImageBatch]:
    """The same images every time, at most `limit`, spread evenly over the held-out split and not augmented, in batches.

    All of them are in memory, in float32."""
    available = len(data.held_out)
    count = min(available, limit)
    indices = [i * available // count for i in range(count)]
    parts = [indices[i : i + batch_size] for i in range(0, count, batch_size)]
    return [_batch(data.held_out, part, len(data.class_names)) for part in parts]


def _batch(images: Images, indices: Sequence[int], num_classes: int) -> ImageBatch:
    labels, known = images.labels[indices], images.known[indices]
    targets: Tensor = one_hot(labels, num_classes) * known[:, None]
    return ImageBatch(images.read(indices).to(torch.float32) / 255, targets.to(torch.float32))
