"""The detector for two bands: what it learns from, what it finds, and how that is judged."""

import pytest
import torch

from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.models.vision.catalog import NANO_VMAMBA
from experiments.detection.detector import (
    STRIDE,
    Detections,
    Detector,
    backbone_config,
    bumps,
    detected,
    detection_loss,
)
from experiments.detection.pictures import draw
from experiments.detection.precision import map50
from experiments.detection.scenes import compose

CONFIG = backbone_config(64, NANO_VMAMBA)


@pytest.fixture(scope="module")
def scenes():
    data = read_images(image_set("digits"))
    return compose([data.train], data.class_names, 6, seed=1)


def ideal(scenes) -> torch.Tensor:
    """The grid of heads that says what is there."""
    of, side = len(scenes.class_names), scenes.visible.shape[-1] // STRIDE
    heat = bumps(scenes.boxes, scenes.classes, side, side, of)
    grid = torch.cat([torch.logit(heat.clamp(1e-6, 1 - 1e-6)), torch.zeros(len(heat), 4, side, side)], 1)
    for image, boxes in enumerate(scenes.boxes):
        for left, top, right, bottom in (boxes / STRIDE).tolist():
            x, y = (left + right) / 2, (top + bottom) / 2
            rest = torch.tensor([right - left, bottom - top]).log().tolist() + [x - int(x), y - int(y)]
            grid[image, of:, int(y), int(x)] = torch.tensor(rest)
    return grid


def test_what_is_there_is_found_and_costs_nearly_nothing(scenes):
    grid = ideal(scenes)
    found = detected(grid)
    for each, boxes, classes in zip(found, scenes.boxes, scenes.classes, strict=True):
        order = each.scores > 0.5
        assert sorted(each.classes[order].tolist()) == sorted(classes.tolist())
        distance = torch.cdist(each.boxes[order], boxes, p=1).min(1).values
        assert distance.max() < 1e-3
    assert map50(found, scenes) == 1 and detection_loss(grid, scenes.boxes, scenes.classes) < 0.05


def test_nothing_found_is_nothing_right(scenes):
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    elsewhere = [
        Detections(boxes.flip(-1), torch.ones(len(boxes)), kinds)
        for boxes, kinds in zip(scenes.boxes, scenes.classes, strict=True)
    ]
    assert map50([nothing] * len(scenes), scenes) == 0 and map50(elsewhere, scenes) < 0.1


@pytest.mark.parametrize("bands", ["both", "visible", "infrared"])
def test_a_band_that_is_not_seen_changes_nothing(scenes, bands):
    torch.manual_seed(0)
    model, images = Detector(CONFIG, 10, bands).eval(), scenes.bands([0, 1])
    with torch.no_grad():
        grid = model(images)
        assert grid.shape == (2, 14, 16, 16)
        for band, channels in (("visible", slice(0, 3)), ("infrared", slice(3, 4))):
            changed = images.clone()
            changed[:, channels] = 1 - changed[:, channels]
            assert model(changed).equal(grid) == (bands not in ("both", band))


def test_it_learns_a_few_scenes(scenes):
    torch.manual_seed(0)
    model, images = Detector(CONFIG, 10), scenes.bands(range(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = detection_loss(model(images), scenes.boxes, scenes.classes)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_picture_has_both_bands(scenes, tmp_path):
    draw(scenes, detected(ideal(scenes)), tmp_path / "found.png", count=3)
    assert (tmp_path / "found.png").stat().st_size > 10_000
