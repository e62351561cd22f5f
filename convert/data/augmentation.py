"""Random changes of training images and their targets.

B images · C channels · H height · W width · K classes
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.core.fields import Checked, Range
from convert.data.randaugment import rand_augment

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Augmentation(Checked):
    """Settings of the changes, all off by default; they happen in this order."""

    flip: Share = 0.0  # probability that an image is mirrored, left to right
    # smallest share of an image's area that is cut out and scaled to its size, 0: off (arXiv 1409.4842; OFA-KD: 0.08)
    resized_crop: Share = 0.0
    crop: Annotated[int, Range(0, 2**10)] = 0  # pixels of black around an image, of which a part of its size is cut out
    randaugment: Annotated[float, Range(0, 10)] = 0.0  # magnitude (arXiv 1909.13719; DeiT and OFA-KD: 9)
    randaugment_std: Annotated[float, Range(0, 10)] = 0.0  # of the magnitude (timm; DeiT and OFA-KD: 0.5)
    randaugment_operations: Annotated[int, Range(1, 10)] = 2
    erasing: Share = 0.0  # probability that a rectangle becomes black (arXiv 1708.04896; DeiT and OFA-KD: 0.25)
    mixup: Annotated[float, Range(0, 100)] = 0.0  # alpha of Beta(alpha, alpha) (arXiv 1710.09412; DeiT and OFA-KD: 0.8)
    cutmix: Annotated[float, Range(0, 100)] = 0.0  # likewise (arXiv 1905.04899; DeiT and OFA-KD: 1)

    @property
    def is_off(self) -> bool:
        """Whether images stay as they are."""
        return all(getattr(self, field.name) == field.default for field in fields(Augmentation))


class Augmenter:
    """Makes the changes. Each call draws from a generator of its own; torch's global one stays as it was."""

    def __init__(self, settings: Augmentation):
        self.settings = settings

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] with values from 0 to 1 and targets [B, K], both on the CPU; `seed` decides everything.

        Mixup and cutmix pair images whose label is known with each other, and the others with each other (ours): the
        mixture of a known and an unknown label would be either a wrong target or a label lost. Where both are on, each
        batch gets one of them, at equal odds (timm)."""
        if self.settings.is_off:
            return images, targets
        # kornia draws from torch's global generator. torch.manual_seed would seed those of GPUs, too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
            for operation in self._operations(images.shape[2:]):
                images = operation(images)
            settings = self.settings
            if settings.randaugment:
                images = rand_augment(
                    images, settings.randaugment, settings.randaugment_std, settings.randaugment_operations
                )
            if settings.erasing:
                images = self._erasing(images)
            if settings.mixup or settings.cutmix:
                images, targets = self._mixed(images, targets)
        return images.clamp(0, 1), targets

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of which each is mixed with another of its group."""
        both = self.settings.mixup and self.settings.cutmix
        by_mixup = bool(self.settings.mixup) and (not both or bool(torch.rand(()) < 0.5))
        images, targets, is_known = images.clone(), targets.clone(), targets.sum(1) > 0
        for group in (is_known, ~is_known):
            rows = torch.nonzero(group)[:, 0]
            if len(rows) > 1:
                mix = self._by_mixup if by_mixup else self._by_cutmix
                images[rows], partners, own = mix(images[rows])
                targets[rows] = own[:, None] * targets[rows] + (1 - own[:, None]) * targets[rows[partners]]
        return images, targets

    def _by_mixup(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, the row each is mixed with [B], and its own share [B]: one draw for all, as in the paper."""
        own = torch.distributions.Beta(self.settings.mixup, self.settings.mixup).sample()
        partners = torch.randperm(len(images))
        return own * images + (1 - own) * images[partners], partners, own.expand(len(images))

    def _by_cutmix(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of cutmix, whose share is what is left of the image's area."""
        mixed, pairs = self._cutmix(images, torch.arange(len(images)))
        return mixed, pairs[0, :, 1].long(), pairs[0, :, 2]

    def _operations(self, size: Sequence[int]) -> list[Any]:
        """Kornia's flip and crops."""
        augmentation, found = _kornia(), []
        if self.settings.flip:
            found.append(augmentation.RandomHorizontalFlip(p=self.settings.flip))
        if self.settings.resized_crop:
            found.append(augmentation.RandomResizedCrop(tuple(size), scale=(self.settings.resized_crop, 1.0)))
        if self.settings.crop:
            found.append(augmentation.RandomCrop(tuple(size), padding=self.settings.crop))
        return found

    @cached_property
    def _erasing(self) -> Any:
        return _kornia().RandomErasing(p=self.settings.erasing)

    @cached_property
    def _cutmix(self) -> Any:
        keys = ["input", "class"]
        return _kornia().RandomCutMixV2(beta=self.settings.cutmix, data_keys=keys, use_correct_lambda=True)


def _kornia() -> Any:
    try:
        import kornia.augmentation
    except ImportError:
        raise UserError("Augmentation needs the `kornia` package: pip install -e '.[images]'.") from None
    return kornia.augmentation
