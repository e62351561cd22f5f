"""Scenes of two bands and folders of real pairs."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from convert.core.errors import UserError
from convert.data.image_sets import image_set
from convert.data.images import read_images
from experiments.detection.folder import read_pairs
from experiments.detection.scenes import APART, compose, overlap


@pytest.fixture(scope="module")
def scenes():
    data = read_images(image_set("digits"))
    return compose([data.train], data.class_names, 12, seed=3), data


def test_a_scene_is_a_function_of_its_seed_and_number(scenes):
    made, data = scenes
    fewer, other = (compose([data.train], data.class_names, 4, seed) for seed in (3, 4))
    assert fewer.visible.equal(made.visible[:4]) and fewer.infrared.equal(made.infrared[:4])
    assert all(a.equal(b) for a, b in zip(fewer.boxes, made.boxes, strict=False))
    assert not other.visible.equal(fewer.visible)


def test_boxes_lie_in_the_image_and_apart(scenes):
    made, _ = scenes
    assert made.bands([0, 5]).shape == (2, 4, 64, 64) and sum(map(len, made.boxes)) >= 12
    for boxes, classes in zip(made.boxes, made.classes, strict=True):
        assert len(boxes) == len(classes) and (boxes >= 0).all() and (boxes <= 64).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 4).all() and (classes < 10).all()
        assert all(overlap(a, b) <= APART for a, b in itertools.combinations(boxes.tolist(), 2))


def test_bands_are_disturbed_apart(scenes):
    made, _ = scenes
    visible, infrared = made.visible.float().mean(1).flatten(1), made.infrared.float().flatten(1)
    alike = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(visible, infrared, strict=True)]
    assert np.mean(alike) < 0.7


def test_classes_of_several_sets_follow_each_other(scenes):
    _, data = scenes
    names = (*data.class_names, *(f"again {name}" for name in data.class_names))
    classes = torch.cat(compose([data.train, data.train], names, 12, seed=0).classes)
    assert (classes < 10).any() and (classes >= 10).any() and classes.max() < 20


# --- real pairs


@pytest.fixture
def folder(tmp_path):
    """Two pairs of 40 x 20 pixels, one object each."""
    for band, mode in (("visible", "RGB"), ("infrared", "L")):
        (tmp_path / band).mkdir()
        for name in ("a.png", "b.png"):
            Image.new(mode, (40, 20), 100).save(tmp_path / band / name)
    labels = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 1, "name": "boat"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [10, 5, 20, 10]},
            {"image_id": 9, "category_id": 1, "bbox": [0, 0, 40, 20]},
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(labels))
    return tmp_path


def test_pairs_are_stretched_with_their_boxes(folder):
    pairs = read_pairs(folder, "train", 32)
    assert pairs.bands([0, 1]).shape == (2, 4, 32, 32) and pairs.class_names == ("boat", "car")
    assert pairs.boxes[0].tolist() == [[8, 8, 24, 24]] and [c.tolist() for c in pairs.classes] == [[1], [0]]


def change(folder, **fields):
    """Change the first annotation."""
    labels = json.loads((folder / "train.json").read_text())
    labels["annotations"][0] |= fields
    (folder / "train.json").write_text(json.dumps(labels))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: change(f, bbox=[30, 5, 20, 10]), r"box must lie within its image.*\[30.0, 5.0, 20.0, 10.0\] in a"),
        (lambda f: change(f, bbox=[10, 5, 0, 10]), "enclose something"),
        (lambda f: change(f, bbox=[10, 5]), "must name images and categories"),
        (lambda f: change(f, bbox=None), "not in COCO's format"),
        (lambda f: change(f, category_id=2), "must name images and categories"),
        (lambda f: Image.new("L", (40, 21)).save(f / "infrared" / "a.png"), r"one size; a.png has \(40, 20\)"),
        (lambda f: (f / "infrared" / "a.png").unlink(), "readable file in .*infrared"),
        (lambda f: (f / "visible" / "a.png").write_bytes(b"no image"), "readable file in .*visible"),
        (lambda f: (f / "train.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "train.json").write_text("[]"), "not in COCO's format"),
        (lambda f: (f / "train.json").unlink(), "is not there"),
    ],
)
def test_wrong_pairs_are_a_sentence(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        read_pairs(folder, "train", 32)
