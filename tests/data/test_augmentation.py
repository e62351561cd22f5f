"""Augmented images are images, and their targets say what is in them."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from convert.core.errors import UserError
from convert.data import randaugment
from convert.data.augmentation import Augmentation, Augmenter
from tests.data.test_image_batches import ALL

CLASSES = 4


def some_images(count: int = 16, channels: int = 3, size=(12, 10)) -> torch.Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(0))


def some_targets(count: int = 16, known: int = 16) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(count) % CLASSES, CLASSES).float() * (
        torch.arange(count) < known
    ).float().unsqueeze(1)


SETTINGS = {
    field.name: {field.name: {"crop": 2, "randaugment": 9.0}.get(field.name, 1.0)}
    for field in dataclasses.fields(Augmentation)
    if not field.name.startswith("randaugment_")
} | {"all": dataclasses.asdict(ALL)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_values_stay_within_0_and_1_and_targets_sum_to_1_or_0(settings, channels):
    images, targets = some_images(channels=channels), some_targets(known=7)
    before = images.clone(), targets.clone()
    augment, changed = Augmenter(Augmentation(**settings)), False
    for step in range(8):
        found, mixed = augment(images, targets, (0, step))
        assert found.shape == images.shape and found.dtype == torch.float32
        assert float(found.min()) >= 0 and float(found.max()) <= 1 and bool(found.isfinite().all())
        assert torch.allclose(mixed.sum(1), (torch.arange(16) < 7).float()) and bool((mixed >= 0).all())
        changed |= not torch.equal(found, images)
    assert changed and torch.equal(images, before[0]) and torch.equal(targets, before[1])


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(name):
    """Images of one colour each: the colour of a mixture says how much of which it holds."""
    values = torch.arange(1, 17) / 16
    images = values.view(-1, 1, 1, 1).expand(-1, 1, 12, 10)
    targets = torch.eye(16) * (torch.arange(16) < 9).float().unsqueeze(1)
    augment = Augmenter(Augmentation(**{name: 1.0}))
    shares = []
    for step in range(20):
        found, mixed = augment(images, targets, (3, step))
        known = mixed[:9]
        assert torch.allclose(found[:9].mean((1, 2, 3)), known @ values, atol=1e-6)
        assert torch.equal(mixed[9:], torch.zeros(7, 16))
        pixels = found[9:].flatten()  # images of unknown labels hold nothing of the others
        assert float(pixels.min()) >= float(values[9]) - 1e-6
        shares += known.diagonal().tolist()
    assert min(shares) < 0.2 and max(shares) > 0.8


def test_a_label_that_is_alone_in_its_batch_is_kept():
    images, targets = some_images(), some_targets(known=1)
    found, mixed = Augmenter(Augmentation(mixup=1.0))(images, targets, (0, 0))
    assert torch.equal(mixed, targets) and torch.equal(found[0], images[0])
    assert not torch.equal(found[1:], images[1:])


def test_mixup_draws_beta_and_where_both_are_on_each_has_half_of_the_batches():
    images, targets = torch.rand(2, 1, 4, 4), torch.eye(2)
    own = [float(Augmenter(Augmentation(mixup=0.4))(images, targets, (0, i))[1].max()) for i in range(400)]
    swapped = [x for x in own if x < 1]  # where the two were paired with each other
    expected = np.maximum(*(lambda x: (x, 1 - x))(np.random.default_rng(0).beta(0.4, 0.4, 100_000)))
    assert 150 < len(swapped) < 250 and abs(np.mean(swapped) - expected.mean()) < 0.04
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]).repeat(8, 1, 1, 1)
    both = Augmenter(Augmentation(mixup=1.0, cutmix=1.0))
    blended = [0 < float(both(images, torch.eye(16), (0, i))[0].flatten().median()) < 1 for i in range(60)]
    partly = [len(both(images, torch.eye(16), (0, i))[0].unique()) > 2 for i in range(60)]
    assert 15 < sum(partly) < 45 and sum(blended) <= sum(partly)


def test_flip_and_crop_do_what_they_say():
    images, targets = some_images(), some_targets()
    assert torch.equal(Augmenter(Augmentation(flip=1.0))(images, targets, (0, 0))[0], images.flip(3))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    places = set()
    for found, image in zip(Augmenter(Augmentation(crop=2))(images, targets, (0, 0))[0], padded, strict=True):
        fits = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.allclose(image[:, y : y + 12, x : x + 10], found, atol=1e-5)
        ]
        assert len(fits) == 1
        places |= set(fits)
    assert len(places) > 5  # drawn for each image


def bytes_of(images: torch.Tensor) -> list[Image.Image]:
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array.squeeze()) for array in arrays]


LEVEL = 0.9  # 9 of 10
PILLOW = {
    "auto_contrast": (lambda image, sign: ImageOps.autocontrast(image), 1),
    "equalize": (lambda image, sign: ImageOps.equalize(image), 1),
    "invert": (lambda image, sign: ImageOps.invert(image), 0),
    "posterize": (lambda image, sign: ImageOps.posterize(image, 1), 0),  # 4 - int(3.6) bits
    "solarize": (lambda image, sign: ImageOps.solarize(image, 26), 0),  # 256 - int(230.4)
    "solarize_add": (
        lambda image, sign: image.point([i + 99 if i < 128 else i for i in range(256)] * len(image.mode)),
        0,
    ),
    "color": (lambda image, sign: ImageEnhance.Color(image).enhance(1 + 0.81 * sign), 2),
    "contrast": (lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + 0.81 * sign), 2),
    "brightness": (lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + 0.81 * sign), 1),
    "sharpness": (lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + 0.81 * sign), 2),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_those_of_pillow(name, channels):
    """timm's RandAugment is made of Pillow's operations: they differ by the rounding to bytes."""
    images = (some_images(6, channels) * 200 + 20).round() / 255
    pillow, tolerance = PILLOW[name]
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    found = getattr(randaugment, name)(images, torch.full((6,), LEVEL), sign).clamp(0, 1)
    expected = [np.asarray(pillow(image, int(s)), float) for image, s in zip(bytes_of(images), sign, strict=True)]
    difference = found.permute(0, 2, 3, 1).squeeze(-1).numpy() * 255 - np.stack(expected)
    assert np.abs(difference).max() <= tolerance + 0.01


GEOMETRY = {  # the matrix that leads from a place in the result to one in the image
    "translate_x": lambda m, size: (1, 0, -0.45 * m * size, 0, 1, 0),
    "translate_y": lambda m, size: (1, 0, 0, 0, 1, -0.45 * m * size),
    "shear_x": lambda m, size: (1, -0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda m, size: (1, 0, 0, -0.3 * m, 1, 0),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", [*GEOMETRY, "rotate"])
def test_images_are_moved_as_far_as_by_timm(name, sign):
    """Pillow moves a smooth image alike, but for the pixels at its border."""
    size = 40
    y, x = np.mgrid[:size, :size] / size
    smooth = (0.5 + 0.25 * np.sin(5 * x + 1) + 0.2 * np.cos(4 * y)).astype(np.float32)
    image, bilinear = Image.fromarray(smooth), Image.Resampling.BILINEAR
    if name == "rotate":
        expected = np.asarray(image.rotate(30 * LEVEL * sign, bilinear))
    else:
        matrix = GEOMETRY[name](LEVEL * sign, size)
        expected = np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, bilinear))
    operation = getattr(randaugment, name)
    found = operation(torch.from_numpy(smooth)[None, None], torch.tensor([LEVEL]), torch.tensor([float(sign)]))[0, 0]
    inside = (expected > 0) & (found.numpy() > 0)
    assert np.mean((expected > 0) != (found.numpy() > 0)) < 0.02
    assert np.quantile(np.abs(expected - found.numpy())[inside], 0.9) < 0.005


def test_each_image_gets_operations_of_its_own():
    images = some_images(1).expand(64, -1, -1, -1)
    found = Augmenter(Augmentation(randaugment=9))(images, torch.eye(64), (0, 0))[0]
    kinds = len(found.flatten(1).unique(dim=0))
    unchanged = int((found == images).flatten(1).all(1).sum())
    assert kinds > 25 and 4 < unchanged < 32  # a quarter has none of its two operations applied


def test_augmentation_without_kornia_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(UserError, match=r"needs the `kornia` package: pip install -e '.\[images\]'"):
        Augmenter(Augmentation(flip=0.5))(some_images(), some_targets(), (0, 0))
    images, targets = some_images(), some_targets()
    assert Augmenter(Augmentation())(images, targets, (0, 0))[0] is images
