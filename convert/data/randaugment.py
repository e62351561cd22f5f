"""RandAugment (arXiv 1909.13719): each image gets operations drawn for it alone, all of one magnitude.

The operations and their ranges are those of timm's "rand-...-inc1", which DeiT and OFA-KD train with: a larger
magnitude always changes an image more, and each operation that was drawn is applied with probability 1/2. What comes
into view from outside is black; timm's is gray. kornia's own RandAugment draws one set of operations for the whole
batch, and its brightness, contrast and shear are not the paper's.

n images · C channels · H height · W width
"""

from collections.abc import Callable

import torch
from torch import Tensor

PROBABILITY = 0.5  # that an operation which was drawn is applied (timm)
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]  # images [n, C, H, W], level [n] from 0 to 1, sign [n] -> images


def rand_augment(images: Tensor, magnitude: float, std: float, num_operations: int) -> Tensor:
    """Images [B, C, H, W], with values from 0 to 1 before and after. `magnitude`: 0 to 10, and `std` its standard
    deviation between the operations. It draws from torch's global generator."""
    count = len(images)
    for _ in range(num_operations):
        choice = torch.randint(len(OPERATIONS), (count,))
        is_applied = torch.rand(count) < PROBABILITY
        level = (magnitude + std * torch.randn(count)).clamp(0, 10) / 10
        sign = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
        images = images.clone()
        for number, operation in enumerate(OPERATIONS):
            rows = torch.nonzero(is_applied & (choice == number))[:, 0]
            if len(rows):
                images[rows] = operation(images[rows], level[rows], sign[rows]).clamp(0, 1)
    return images


def auto_contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 1; one of a single value stays as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-6), x)


def equalize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(x)


def invert(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return 1 - x


def rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import rotate

    return rotate(x, 30 * level * sign)


def posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Keep the 4 to 0 highest of 8 bits."""
    step = 2.0 ** (4 + (4 * level).floor())[:, None, None, None]
    return ((255 * x + 0.5).floor() / step).floor() * step / 255


def solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Invert what is at 256 (1 - level) of 255, or above."""
    threshold = (256 - (256 * level).floor()) / 255 - 0.5 / 255
    return torch.where(x < threshold[:, None, None, None], x, 1 - x)


def solarize_add(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Add up to 110 of 255 to what is below 128."""
    return torch.where(x < 127.5 / 255, x + ((110 * level).floor() / 255)[:, None, None, None], x)


def color(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Blend with the gray image; a gray image stays as it is."""
    from kornia.enhance.adjust import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(x, _factor(level, sign))


def contrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.enhance.adjust import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(x, _factor(level, sign))


def brightness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.enhance.adjust import adjust_brightness_accumulative

    return adjust_brightness_accumulative(x, _factor(level, sign))


def sharpness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.enhance import sharpness

    return sharpness(x, _factor(level, sign))


def shear_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import shear

    amount = 0.3 * level * sign
    return shear(x, torch.stack([amount, torch.zeros_like(amount)], 1), align_corners=True)


def shear_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import shear

    amount = 0.3 * level * sign
    return shear(x, torch.stack([torch.zeros_like(amount), amount], 1), align_corners=True)


def translate_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import translate

    amount = 0.45 * level * sign * x.shape[3]
    return translate(x, torch.stack([amount, torch.zeros_like(amount)], 1))


def translate_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import translate

    amount = 0.45 * level * sign * x.shape[2]
    return translate(x, torch.stack([torch.zeros_like(amount), amount], 1))


def _factor(level: Tensor, sign: Tensor) -> Tensor:
    """Factors of Pillow's enhancements: 1 changes nothing."""
    return (1 + 0.9 * level * sign).clamp_min(0.1)


OPERATIONS: tuple[Operation, ...] = (
    auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
    shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
