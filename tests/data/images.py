"""What the tests of images share: folders and idx files made by the test."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C], or [H, W] for one channel."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(place: Path, array: np.ndarray, **options) -> Path:
    """Write an image; the folders above it are made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(place, **options)
    return place


def make_folder(root: Path, classes=("cat", "dog"), count: int = 10, size=(6, 5), channels: int = 3) -> Path:
    """`count` .png images in a folder for each class, no two of them alike."""
    for label, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i}.png", pixels(*size, 1000 * label + i, channels))
    return root


def idx(magic: int, array: np.ndarray) -> bytes:
    """The content of an idx file."""
    return struct.pack(f">I{array.ndim}I", magic, *array.shape) + array.tobytes()


def make_fashion(folder: Path, train: int = 40, test: int = 20, size=(4, 3)) -> dict[str, np.ndarray]:
    """A small Fashion-MNIST; the arrays by the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for prefix, count in (("train", train), ("t10k", test)):
        arrays[f"{prefix}-images-idx3-ubyte.gz"] = np.stack([pixels(*size, count + i, 1) for i in range(count)])
        arrays[f"{prefix}-labels-idx1-ubyte.gz"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / name).write_bytes(gzip.compress(idx(0x0800 + array.ndim, array)))
    return arrays
