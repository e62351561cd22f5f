"""A batch of images is a function of the seed and the step."""

import itertools

import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.data.augmentation import Augmentation
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.images import ImageData, Images

ALL = Augmentation(
    flip=0.5, crop=1, randaugment=9, randaugment_std=0.5, erasing=0.25, mixup=0.8, cutmix=1.0
)  # of OFA-KD's configuration for CIFAR-100, with a smaller crop
CLASSES = 3


def make_images(count: int = 10, channels: int = 1, known: int = 10) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * count, channels, 8, 9), np.uint8)
    labels = torch.arange(count) % CLASSES
    return Images(pixels, np.arange(count) * 2, labels, torch.arange(count) < known)


def same(a, b) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", [Augmentation(), ALL], ids=["plain", "all"])
def test_a_run_resumed_at_any_step_sees_the_same_batches(augmentation, channels):
    """Whatever was asked before, and whatever else draws random numbers; what it draws disturbs nobody."""
    images = make_images(channels=channels)
    batches = ImageBatches(images, CLASSES, 4, 7, augmentation)
    first = [batches(step) for step in range(12)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for step in (11, 3, 3, 0):
        assert same(ImageBatches(images, CLASSES, 4, 7, augmentation)(step), first[step])
        assert same(batches(step), first[step])
    assert torch.equal(torch.rand(3), expected)
    assert not any(same(a, b) for a, b in itertools.combinations(first, 2))
    assert not same(ImageBatches(images, CLASSES, 4, 8, augmentation)(0), first[0])


def test_every_image_comes_once_in_an_epoch_and_in_another_order_in_the_next():
    images = make_images()
    batches = ImageBatches(images, CLASSES, 4)
    rows = torch.cat([batches(step).images for step in range(5)]).flatten(1)  # two epochs of ten
    stored = (images.read(range(10)).float() / 255).flatten(1)
    order = [int(torch.nonzero((stored == row).all(1))[0]) for row in rows]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]


def test_targets_are_one_hot_or_unknown():
    images = make_images(known=4)
    batch = ImageBatches(images, 5, 10)(0)
    assert batch.targets.shape == (10, 5) and batch.num_targets == 4
    for row, target in zip(batch.images.flatten(1), batch.targets, strict=True):
        i = int(torch.nonzero(((images.read(range(10)).float() / 255).flatten(1) == row).all(1))[0])
        expected = torch.zeros(5)
        expected[int(images.labels[i])] = float(i < 4)
        assert torch.equal(target, expected)


def test_a_batch_may_be_larger_than_the_set():
    assert ImageBatches(make_images(3), CLASSES, 8)(1).num_units == 8


def test_held_out_images_are_always_the_same_and_spread_evenly():
    images = make_images(10)
    data = ImageData(images, images, ("a", "b", "c"), 1, (8, 9), "key")
    batches = held_out_images(data, 2, 5)
    assert [batch.num_units for batch in batches] == [2, 2, 1]
    found = torch.cat([batch.images for batch in batches])
    assert torch.equal(found, images.read([0, 2, 4, 6, 8]).float() / 255)
    assert torch.cat([batch.targets for batch in batches]).argmax(1).tolist() == [0, 2, 1, 0, 2]
    assert sum(batch.num_units for batch in held_out_images(data, 4, 99)) == 10


def test_wrong_numbers_are_refused():
    images = make_images()
    with pytest.raises(
        UserError, match="Labels must be below the number of classes; there are 2 classes and a label 2"
    ):
        ImageBatches(images, 2, 4)
    with pytest.raises(UserError, match="batch_size must be"):
        ImageBatches(images, CLASSES, 0)
    with pytest.raises(UserError, match="step must be"):
        ImageBatches(images, CLASSES, 2)(-1)
    with pytest.raises(UserError, match="flip must be"):
        Augmentation(flip=1.5)
