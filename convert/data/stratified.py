"""Choosing some images of each class, the same ones on every machine."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from convert.core.errors import UserError

HELD_OUT = 0.1  # of each class, where a set has no split (ours)


def chosen(labels: np.ndarray, counts: Sequence[int], keys: Sequence[str]) -> np.ndarray:
    """bool [N]: so many images of each class, those whose keys have the smallest hashes, so that one more image changes
    little."""
    mask = np.zeros(len(labels), bool)
    digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys]
    for label, count in enumerate(counts):
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=digests.__getitem__)
        mask[rows[:count]] = True
    return mask


def in_proportion(labels: np.ndarray, num_classes: int, total: int) -> list[int]:
    """How many images of each class make `total`, in proportion to the classes (largest remainders)."""
    exact = np.bincount(labels, minlength=num_classes) * total / len(labels)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def held_out_share(labels: np.ndarray, class_names: Sequence[str], keys: Sequence[str]) -> np.ndarray:
    """bool [N]: a tenth of each class (ours), one image at least. Raises UserError for a class with only one."""
    sizes = np.bincount(labels, minlength=len(class_names))
    if len(small := np.flatnonzero(sizes < 2)):
        raise UserError(
            f"Each class must have two images at least, one of them held out; {class_names[small[0]]!r} has"
            f" {sizes[small[0]]}. Add images, or remove the class."
        )
    return chosen(labels, [max(1, round(HELD_OUT * size)) for size in sizes.tolist()], keys)


def known_share(labels: np.ndarray, class_names: Sequence[str], share: float, seed: int) -> np.ndarray:
    """bool [N]: the images whose labels may be used, `share` of each class, rounded up and drawn by `seed`.

    Raises UserError for a share that is less than one image of some class."""
    if share >= 1:
        return np.ones(len(labels), bool)
    sizes = np.bincount(labels, minlength=len(class_names))
    smallest = int(sizes.argmin())
    if round(share * sizes[smallest], 9) < 1:
        least = math.ceil(1000 / sizes[smallest]) / 1000
        raise UserError(
            f"The share of known labels must leave each class one at least; {share:g} of the {sizes[smallest]:,} images"
            f" of {class_names[smallest]!r} is less. Give {least:g} or more."
        )
    counts = [math.ceil(round(share * size, 9)) for size in sizes.tolist()]
    return chosen(labels, counts, [f"{seed} {i}" for i in range(len(labels))])
