"""Labelled images, read: a training split, a held-out one, and which labels may be used.

N images · C channels · H height · W width
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.core.fields import Range, checked
from convert.data.idx import read_split
from convert.data.image_files import Found, read_files
from convert.data.image_sets import DIGITS, FASHION, FASHION_CLASSES, ImageSet
from convert.data.stratified import chosen, in_proportion, known_share

DIGITS_HELD_OUT = 500  # of 1,797 (ours)
Side = Annotated[int, Range(1, 2**14)]


@dataclass(frozen=True)
class Images:
    """Some of the stored images."""

    pixels: np.ndarray  # uint8 [M, C, H, W], all that are stored: in memory or mapped from the cache
    rows: np.ndarray  # int64 [N]: which of them these are
    labels: Tensor  # int64 [N]
    known: Tensor  # bool [N]: whether the label may be used

    def __len__(self) -> int:
        return len(self.rows)

    def labelled(self) -> "Images":
        """Those whose label may be used."""
        chosen = torch.nonzero(self.known).flatten()
        return Images(self.pixels, self.rows[chosen.numpy()], self.labels[chosen], self.known[chosen])

    def read(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 [n, C, H, W]: the images with these indices, from 0 to N - 1."""
        return torch.from_numpy(self.pixels[self.rows[np.asarray(indices, np.int64)]])


@dataclass(frozen=True)
class ImageData:
    """A set of images, ready to make batches of. `size` is (height, width) of the stored images, `skipped` names the
    files that do not decode. The fingerprint changes with images, labels and split, not with which labels are known."""

    train: Images
    held_out: Images
    class_names: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    fingerprint: str
    skipped: tuple[str, ...] = ()


@checked
def read_images(
    image_set: ImageSet,
    *,
    labels: Annotated[float, Range(0, 1)] = 1.0,
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0,
    size: tuple[Side, Side] = (224, 224),
) -> ImageData:
    """Read a set of images. `labels`: the share of the training labels of each class that may be used, drawn by `seed`.

    Images of a folder or of the hub are kept at `size` (height, width), the teacher's, or as they are where all have
    one size that is no larger; digits and fashion-mnist stay as they are. Where a set has no held-out split, a tenth of
    each class is held out (ours). Raises UserError for images that cannot be read, a class without any, and a share
    that leaves a class without a label."""
    if image_set.spec == DIGITS:
        found = _digits(image_set)
    elif image_set.spec == FASHION and image_set.root is not None:
        found = _fashion(image_set, image_set.root)
    else:
        found = read_files(image_set, size)
    train, held_out = np.flatnonzero(~found.is_held_out), np.flatnonzero(found.is_held_out)
    _check_classes(image_set.spec, found, len(held_out))
    known = known_share(found.labels[train], found.class_names, labels, seed)
    channels, height, width = found.pixels.shape[1:]
    return ImageData(
        Images(found.pixels, train, torch.from_numpy(found.labels[train]), torch.from_numpy(known)),
        Images(found.pixels, held_out, torch.from_numpy(found.labels[held_out]), torch.ones(len(held_out)).bool()),
        found.class_names,
        channels,
        (height, width),
        found.fingerprint,
        found.skipped,
    )


def _digits(source: ImageSet) -> Found:
    """Scikit-learn's digits: values from 0 to 16 become 0 to 255; 500 images are held out, in proportion to the
    classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("The digits need the `scikit-learn` package: pip install -e '.[images]'.") from None
    digits = load_digits()
    pixels = np.round(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    counts = in_proportion(labels, 10, DIGITS_HELD_OUT)
    return _in_memory(source, pixels, labels, chosen(labels, counts, [str(i) for i in range(len(labels))]))


def _fashion(source: ImageSet, folder: Path) -> Found:
    """Fashion-MNIST (arXiv 1708.07747); its own test split is held out."""
    splits = [read_split(folder, prefix, len(FASHION_CLASSES)) for prefix in ("train", "t10k")]
    if len({images.shape[1:] for images, _ in splits}) > 1:
        raise UserError(f"Both splits must have images of one size; those in {folder} differ. Get the files again.")
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*splits, strict=True))
    is_held_out = np.arange(len(labels)) >= len(splits[0][1])
    return _in_memory(source, pixels[:, None], labels.astype(np.int64), is_held_out)


def _in_memory(source: ImageSet, pixels: np.ndarray, labels: np.ndarray, is_held_out: np.ndarray) -> Found:
    digest = hashlib.sha256(f"{source.class_names} {pixels.shape}".encode())
    for array in (pixels, labels, is_held_out):
        digest.update(np.ascontiguousarray(array).data)
    return Found(pixels, labels, is_held_out, source.class_names or (), digest.hexdigest()[:20])


def _check_classes(spec: str, found: Found, num_held_out: int) -> None:
    """Raise UserError where a classifier could not be trained or measured."""
    names = found.class_names
    if len(names) < 2:
        raise UserError(f"A classifier needs two classes at least; {spec!r} has only {names[0]!r}. Give another set.")
    counts = np.bincount(found.labels[~found.is_held_out], minlength=len(names))
    if len(empty := np.flatnonzero(counts == 0)):
        raise UserError(
            f"Each class needs images to train on; {names[empty[0]]!r} of {spec!r} has none. Add some, or remove it."
        )
    if not num_held_out:
        raise UserError(
            f"The held-out split must have images; that of {spec!r} has none. Add some, or remove the split."
        )
