"""Image files -> arrays in the cache: each image is decoded once, and those that do not decode are known from then on.

Folders are read by Pillow alone: `datasets` would copy them into a cache of its own, and cuts them into splits by rules
of its own. C channels · H height · W width
"""

import hashlib
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from convert.core.errors import UserError
from convert.core.fields import shown
from convert.core.files import sha256
from convert.data import array_cache
from convert.data.hub import hub_data
from convert.data.image_decoding import check_pillow, decoded, fitted
from convert.data.image_sets import HELD_OUT_NAMES, ImageSet
from convert.data.stratified import held_out_share

FAILURES = 0.01  # of the images may not decode; one always may (ours)
GROUP = 256  # images that are decoded at once
VERSION = 1  # of what is kept


class Row(NamedTuple):
    """An image that is not decoded. `name` depends on no absolute path; `is_held_out` is None where the split is to be
    drawn."""

    name: str
    source: Path | bytes
    label: int
    is_held_out: bool | None


class Shape(NamedTuple):
    """How images are kept. `is_own`: they all have this size, so none was resized."""

    channels: int
    height: int
    width: int
    is_own: bool


class DoesNotFit(Exception):
    """An image was met that the shape so far cannot hold; it names one that can."""

    def __init__(self, shape: Shape):
        self.shape = shape


@dataclass(frozen=True)
class Found:
    """Images of a set, decoded. `skipped`: the names of those that do not decode."""

    pixels: np.ndarray  # uint8 [N, C, H, W], in memory or mapped from the cache
    labels: np.ndarray  # int64 [N]
    is_held_out: np.ndarray  # bool [N]
    class_names: tuple[str, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()


def read_files(images: ImageSet, size: tuple[int, int]) -> Found:
    """The images of a folder or of a hub data set, decoded into the cache once.

    They are kept at `size` (height, width) or, where all have one and the same size that is no larger, as they are: a
    small image gains nothing from being enlarged before a model does it. Gray images stay gray where all are."""
    check_pillow()
    key = hashlib.sha256(f"{_fingerprint(images)} {size} {VERSION}".encode()).hexdigest()[:20]
    folder, meta = array_cache.kept("images", key, lambda folder: _write(images, size, folder))
    if skipped := [f"{shown(name)} ({reason})" for name, reason in meta["skipped"]]:
        first = "; ".join(skipped[:3]) + (f"; and {len(skipped) - 3:,} more" if len(skipped) > 3 else "")
        print(f"{len(skipped):,} images of {images.spec} do not decode and are left out: {first}.")
    pixels, labels, is_held_out = (
        np.load(folder / f"{name}.npy", mmap_mode="r" if name == "pixels" else None)
        for name in ("pixels", "labels", "is_held_out")
    )
    class_names, skipped_names = tuple(meta["class_names"]), tuple(name for name, _ in meta["skipped"])
    return Found(pixels, labels, is_held_out, class_names, key, skipped_names)


def _fingerprint(images: ImageSet) -> str:
    """A hash that changes when any image, its class or its split does; for a hub data set, when its name or
    configuration does."""
    digest = hashlib.sha256(repr(images.hub).encode())
    if images.root is not None:
        rows = list(_rows_of_folder(images))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for row, content in zip(rows, pool.map(_content_hash, rows, chunksize=GROUP), strict=True):
                digest.update(row.name.encode("utf-8", "surrogateescape"))
                digest.update(f"\0{content}\0{row.label}\0{row.is_held_out}\0".encode())
    return digest.hexdigest()


def _content_hash(row: Row) -> str:
    try:
        return sha256(Path(row.source))  # type: ignore[arg-type]
    except OSError as error:  # a link that leads nowhere: it will be skipped
        return str(error.strerror)


def _rows_of_folder(images: ImageSet) -> Iterator[Row]:
    assert images.root is not None
    for files, is_held_out in ((images.train, False), (images.held_out, True)):
        for file, label in files:
            name = file.relative_to(images.root).as_posix()
            yield Row(name, file, label, is_held_out if images.held_out else None)


def _write(images: ImageSet, size: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Decode everything into `folder`. The shape follows from the images: where one does not fit what those before it
    led to expect, which shows early, it begins anew."""
    shape: Shape | None = None
    while True:
        try:
            return _write_as(shape, images, size, folder)
        except DoesNotFit as wider:
            shape = wider.shape


def _write_as(shape: Shape | None, images: ImageSet, size: tuple[int, int], folder: Path) -> dict[str, Any]:
    class_names: list[str] = list(images.class_names or ())
    if images.hub:
        rows: Iterator[Row] = _rows_of_hub(*images.hub, class_names)
        total = None
    else:
        rows, total = _rows_of_folder(images), len(images.train) + len(images.held_out)
        need = total * shape.channels * shape.height * shape.width if shape else 0
        if need > (free := shutil.disk_usage(folder).free):
            raise UserError(
                f"The images are kept decoded, in {need / 2**30:,.1f} GiB; {folder.parent} has {free / 2**30:,.1f} GiB"
                " left. Free some space, or set CONVERT_CACHE."
            )
    kept: list[Row] = []
    failed: list[tuple[Row, str]] = []

    def decode(row: Row) -> np.ndarray | str:
        try:
            image = decoded(row.source)
        except Exception as error:  # a broken file makes Pillow raise whatever its decoders do
            return _reason(error)
        wider = _widened(shape, image, size)
        if shape is None or wider != shape:
            raise DoesNotFit(wider)
        return fitted(image, shape.channels, shape.height, shape.width)

    with (
        (folder / "pixels.npy").open("wb") as file,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=total, unit="img", desc="decode", delay=3) as bar,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", module="PIL")  # of bad metadata, bombs: what matters is said below
        header = _header(file, (0, *shape[:3])) if shape else 0
        while group := list(itertools.islice(rows, GROUP)):
            for row, result in zip(group, pool.map(decode, group), strict=True):
                row = row._replace(source=b"")  # the images of a data set do not fit in memory
                if isinstance(result, str):
                    failed.append((row, result))
                else:
                    kept.append(row)
                    file.write(result.tobytes())
                bar.update()
        _check(images.spec, kept, failed, class_names)
        assert shape is not None
        file.seek(0)
        assert _header(file, (len(kept), *shape[:3])) == header
    labels = np.array([row.label for row in kept], np.int64)
    if kept[0].is_held_out is None:
        is_held_out = held_out_share(labels, class_names, [row.name for row in kept])
    else:
        is_held_out = np.array([row.is_held_out for row in kept], bool)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "is_held_out.npy", is_held_out)
    skipped = [(row.name, reason) for row, reason in failed]
    return {"source": images.spec, "class_names": class_names, "skipped": skipped}


def _widened(shape: Shape | None, image: Any, size: tuple[int, int]) -> Shape:
    """The shape that holds this image, too."""
    channels = len(image.getbands())
    own = image.height, image.width
    if shape is None:
        is_own = own[0] <= size[0] and own[1] <= size[1]
        height, width = own if is_own else size
        return Shape(channels, height, width, is_own)
    channels = max(channels, shape.channels)
    if shape.is_own and own != (shape.height, shape.width):
        return Shape(channels, size[0], size[1], False)
    return shape._replace(channels=channels)


def _header(file: Any, shape: tuple[int, ...]) -> int:
    """Write the header of a .npy file, whose length leaves room for any number of images, and return that length."""
    start = file.tell()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.tell() - start


def _check(spec: str, kept: list[Row], failed: list[tuple[Row, str]], class_names: list[str]) -> None:
    """Raise UserError where too few images are left."""
    if not kept and not failed:
        raise UserError(f"The data {spec!r} holds no images.")
    total, left = len(kept) + len(failed), {row.label for row in kept}
    for row, reason in failed:
        if row.label not in left:
            raise UserError(
                f"Each class needs an image that decodes; {class_names[row.label]!r} of {spec!r} has none:"
                f" {shown(row.name)} ({reason}). Mend its images, or remove the class."
            )
    if len(failed) > max(1, FAILURES * total):
        row, reason = failed[0]
        raise UserError(
            f"At most {FAILURES:.0%} of the images may fail to decode; of {spec!r} {len(failed):,} of {total:,} do, the"
            f" first of them {shown(row.name)} ({reason}). Mend or remove them."
        )


def _reason(error: Exception) -> str:
    """Why an image does not decode, in a few words without its place."""
    name = type(error).__name__
    if name == "UnidentifiedImageError":
        return "no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split("\n")[0]
    return text[:100] or name


def _rows_of_hub(name: str, config: str | None, class_names: list[str]) -> Iterator[Row]:
    """The rows of a data set's training split and of what it holds out; fills in the names of its classes."""
    with hub_data(name, config, "Without network use --data digits or --data FOLDER.") as splits:
        import datasets
        from datasets.download.streaming_download_manager import xopen

        if "train" not in splits:
            raise UserError(f"A data set needs a split 'train'; {name} has {', '.join(splits)}. Give another set.")
        held_out = next((split for split in HELD_OUT_NAMES if split in splits), None)
        for split in ("train", held_out) if held_out else ("train",):
            image, label, names = _columns(name, splits[split].features)
            class_names[:] = class_names or names
            rows = splits[split].select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
            for number, row in enumerate(rows):
                value, where = row[image], f"{split}/{number}"
                if value is None or row[label] is None or not 0 <= row[label] < len(names):
                    raise UserError(
                        f"Each row of a data set needs an image and a label; row {number} of {split} of {name} lacks"
                        f" one (label {row[label]}). Give another set."
                    )
                content = value["bytes"]
                if content is None:
                    with xopen(value["path"], "rb") as file:
                        content = file.read()
                yield Row(where, content, row[label], split == held_out if held_out else None)


def _columns(name: str, features: Any) -> tuple[str, str, list[str]]:
    """The names of the columns of images and of labels, and of the classes. Of several columns of labels the one with
    the most classes is meant (fine before coarse)."""
    kinds = {column: type(feature).__name__ for column, feature in (features or {}).items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) != 1 or not labels:
        found = ", ".join(f"{column} ({kind})" for column, kind in kinds.items()) or "none that are known"
        raise UserError(
            f"A data set needs one column of images and one of class labels; those of {name} are {found}. Give another"
            " set, or a folder."
        )
    label = max(labels, key=lambda column: features[column].num_classes)
    return images[0], label, list(features[label].names)
