"""Scenes of two bands, composed from real scanned images: what one band hides, the other may show.

N scenes · S side in pixels · n objects of a scene
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from convert.data.images import Images

MOST = 4  # objects of a scene; all numbers of this file are ours
SIDES = (14, 27)  # of an object in pixels, the last not included
HIDDEN = 0.25  # probability that an object is all but invisible in one of the bands
GLARE, OCCLUSION = 0.5, 0.5  # probabilities, for each band
NOISE = (0.02, 0.15)  # standard deviation, drawn for each band
SEEN = 0.2  # of an item's brightest pixel: what its box encloses
APART = 0.1  # largest intersection over union of two boxes
TRIES = 20  # places that are tried for an object


@dataclass(frozen=True)
class Pairs:
    """Images of two bands that lie over each other, and their objects. `visible` uint8 [N, 3, H, W], `infrared` uint8
    [N, 1, H, W]; `boxes` float32 [n, 4] of each, left, top, right and bottom in pixels; `classes` int64 [n]."""

    visible: Tensor
    infrared: Tensor
    boxes: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.visible)

    def bands(self, indices: Sequence[int] | NDArray) -> Tensor:
        """[n, 4, H, W] from 0 to 1: red, green, blue and infrared."""
        rows = torch.as_tensor(np.asarray(indices, np.int64))
        return torch.cat([self.visible[rows], self.infrared[rows]], 1).float() / 255


def compose(items: Sequence[Images], class_names: tuple[str, ...], count: int, seed: int, side: int = 64) -> Pairs:
    """`count` scenes of `side` pixels, each a function of the seed and its number. `items`: sets of images of objects,
    bright on black, whose classes follow each other in `class_names`."""
    firsts = np.cumsum([0] + [int(each.labels.max()) + 1 for each in items])
    scenes = [_scene(items, firsts, np.random.default_rng([seed, i]), side) for i in tqdm(range(count), unit="scene")]
    bands, boxes, classes = zip(*scenes, strict=True)
    pixels = torch.from_numpy(np.stack(bands))
    return Pairs(pixels[:, :3], pixels[:, 3:], boxes, classes, class_names)


def _scene(
    items: Sequence[Images], firsts: NDArray, rng: np.random.Generator, side: int
) -> tuple[NDArray, Tensor, Tensor]:
    """One scene: uint8 [4, S, S], boxes [n, 4] and classes [n]."""
    bands = np.concatenate([_ground(rng, 3, side), _ground(rng, 1, side)])
    boxes, classes = list[tuple[int, int, int, int]](), list[int]()
    for _ in range(rng.integers(1, MOST + 1)):
        kind = rng.integers(len(items))
        number = int(rng.integers(len(items[kind])))
        alpha = _resized(items[kind].read([number])[0, 0], int(rng.integers(*SIDES)))
        if (place := _place(alpha, boxes, rng, side)) is None:
            continue
        (top, left), box = place
        _paint(bands, alpha, top, left, rng)
        boxes.append(box)
        classes.append(int(firsts[kind] + items[kind].labels[number]))
    for band in (slice(0, 3), slice(3, 4)):
        _disturb(bands[band], rng)
    return (
        np.round(bands.clip(0, 1) * 255).astype(np.uint8),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
    )


def _ground(rng: np.random.Generator, channels: int, side: int) -> NDArray:
    """Smooth ground: noise of a coarse grid, stretched."""
    coarse = torch.from_numpy(rng.uniform(0.1, 0.5, (1, channels, 4, 4)))
    return F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)[0].numpy()


def _resized(item: Tensor, side: int) -> NDArray:
    """How much an object covers each pixel [side, side], from 0 to 1."""
    return F.interpolate(item[None, None].double() / 255, (side, side), mode="bilinear", antialias=True)[0, 0].numpy()


def _place(
    alpha: NDArray, boxes: list[tuple[int, int, int, int]], rng: np.random.Generator, side: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]] | None:
    """Top and left of the object, and its box; None where no place was found apart from the others."""
    rows, columns = np.nonzero(alpha > SEEN * alpha.max())
    for _ in range(TRIES):
        top, left = (int(rng.integers(0, side - len(alpha) + 1)) for _ in range(2))
        box = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
        if all(overlap(box, other) <= APART for other in boxes):
            return (top, left), box
    return None


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _paint(bands: NDArray, alpha: NDArray, top: int, left: int, rng: np.random.Generator) -> None:
    """Draw an object into both bands: its colour says nothing of its warmth."""
    place = bands[:, top : top + len(alpha), left : left + len(alpha)]
    colour, warmth = rng.uniform(0.3, 1, 3), rng.uniform(0.5, 1, 1)
    hidden = rng.integers(2) if rng.random() < HIDDEN else -1
    for number, (channels, value) in enumerate(((slice(0, 3), colour), (slice(3, 4), warmth))):
        strength = 0.1 if number == hidden else 1.0
        place[channels] += strength * alpha * (value[:, None, None] - place[channels])


def _disturb(band: NDArray, rng: np.random.Generator) -> None:
    """Glare, an occlusion and noise of one band, in place."""
    side = band.shape[-1]
    if rng.random() < GLARE:
        y, x, radius = *rng.uniform(0, side, 2), rng.uniform(side / 10, side / 5)
        places = np.arange(side)
        spot = np.exp(-((places[:, None] - y) ** 2 + (places - x) ** 2) / (2 * radius**2))
        band += spot * (1 - band)
    if rng.random() < OCCLUSION:
        height, width = rng.integers(side // 10, side // 3, 2)
        top, left = rng.integers(0, side - height), rng.integers(0, side - width)
        band[:, top : top + height, left : left + width] = rng.uniform(0.1, 0.5, (len(band), 1, 1))
    band += rng.normal(0, rng.uniform(*NOISE), band.shape)
