"""Sets of labelled images: which there are, and where they lie.

This module needs the standard library alone, so that a command can refuse wrong data before it imports anything large.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from convert.core.errors import UserError
from convert.core.fields import checked
from convert.core.places import path_of

DIGITS, FASHION = "digits", "fashion-mnist"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FASHION_HUB = "zalando-datasets/fashion_mnist"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# the first that has images is held out; the labels of a test split are often not public
HELD_OUT_NAMES = ("val", "valid", "validation", "test")
KINDS = "'digits', 'fashion-mnist', a folder that has a folder of images for each class, or hub:NAME"


@dataclass(frozen=True)
class ImageSet:
    """A set of labelled images, found and not read. `class_names` is None where only reading shows them.

    A folder has (file, class) pairs in `train` and `held_out`, which is empty where a split is to be drawn. `hub` is
    (name, configuration) of a data set for `datasets`."""

    spec: str
    class_names: tuple[str, ...] | None = None
    root: Path | None = None
    train: tuple[tuple[Path, int], ...] = ()
    held_out: tuple[tuple[Path, int], ...] = ()
    hub: tuple[str, str | None] | None = None
    is_sampled: bool = False

    def places(self) -> list[Path]:
        """The files and folders on this machine that hold the images: a run's folder must be apart from them."""
        if self.hub:
            return [Path(self.hub[0])]
        if self.root is None:
            return []
        files = [file for file, _ in (*self.train, *self.held_out)]
        return [self.root, *sorted({file.parent for file in files} | {file for file in files if file.is_symlink()})]


def whole_name(spec: str) -> str:
    """The name of data, with a path in it written in full."""
    place = Path(spec).expanduser()
    return spec if spec in (DIGITS, FASHION) or not place.exists() else str(place.absolute())


@checked
def image_set(spec: str | Path) -> ImageSet:
    """The images that `spec` names; nothing is read yet. Raises UserError where there are none.

    * "digits": 1,797 images of scikit-learn, 8 x 8 and gray;
    * "fashion-mnist": 70,000 images, 28 x 28 and gray, from the folder in FASHION_MNIST, else from Debian's package,
      else from the hub;
    * a folder with a folder of images for each class, or with these in train/, and in val/, valid/, validation/ or
      test/ (the first of them that has images) for the held-out split;
    * "hub:NAME" or "hub:NAME:CONFIG": a data set with a column of images and one of class labels.
    """
    spec = str(spec)
    if spec == DIGITS:
        return ImageSet(spec, tuple("0123456789"))
    if spec == FASHION:
        return _fashion()
    if spec.startswith("hub:"):
        name, _, config = spec[4:].partition(":")
        if not name:
            raise UserError(f"A hub data set is written hub:NAME or hub:NAME:CONFIG; got {spec!r}.")
        return ImageSet(spec, hub=(name, config or None))
    root = path_of(spec, "--data")
    if spec in ("stdlib", "teacher") or spec.startswith("teacher:"):
        raise UserError(f"Images cannot be made of the text {spec!r}. Give {KINDS}.")
    if not root.exists():
        raise UserError(f"There are no images at {spec!r}. Give {KINDS}.")
    if not root.is_dir():
        raise UserError(f"Images are read from folders; {spec!r} is a file. Unpack it, or give {KINDS}.")
    try:
        return _folder(spec, root)
    except OSError as error:
        raise UserError(f"The folder {spec!r} cannot be read ({error}). Mend its permissions, or copy it.") from None


def _fashion() -> ImageSet:
    given = os.environ.get("FASHION_MNIST")
    folder = path_of(given, "FASHION_MNIST") if given else FASHION_FOLDER
    if given and not folder.is_dir():
        raise UserError(f"FASHION_MNIST must name a folder; there is none at {given!r}. Mend or unset it.")
    if folder.is_dir():
        return ImageSet(FASHION, FASHION_CLASSES, folder)
    return ImageSet(FASHION, FASHION_CLASSES, hub=(FASHION_HUB, None))


def _folder(spec: str, root: Path) -> ImageSet:
    splits = [root / name for name in HELD_OUT_NAMES if _folders(root / name)]
    if not _folders(root / "train"):
        if splits:
            raise UserError(
                f"A folder with {splits[0].name}/ needs train/ beside it, each with a folder for each class; {spec!r}"
                " has none. Rename what holds the training images to train."
            )
        classes, train = _classes(root)
        return ImageSet(spec, _names(spec, classes, train), root, train)
    classes, train = _classes(root / "train")
    names = _names(spec, classes, train)
    for split in splits:
        others, held_out = _classes(split)
        if unknown := sorted(set(others) - set(classes)):
            raise UserError(f"Classes of {split} must be in train/, too; {unknown[0]!r} is not. Rename or remove it.")
        if held_out:
            numbers = [classes.index(name) for name in others]
            return ImageSet(spec, names, root, train, tuple((file, numbers[label]) for file, label in held_out))
    return ImageSet(spec, names, root, train)


def _classes(folder: Path) -> tuple[list[str], tuple[tuple[Path, int], ...]]:
    """The names of the classes, sorted, and all images of them."""
    classes = _folders(folder)
    return [place.name for place in classes], tuple(
        (file, number) for number, place in enumerate(classes) for file in _images(place)
    )


def _names(spec: str, classes: list[str], images: tuple[tuple[Path, int], ...]) -> tuple[str, ...]:
    """The names of the classes. Raises UserError where there are too few, or one has no images."""
    if not images:
        raise UserError(
            f"The folder {spec!r} must have a folder for each class, with images in it ({', '.join(SUFFIXES)}); it has"
            f" {'no images in its folders' if classes else 'no folders'}. Give {KINDS}."
        )
    used = {label for _, label in images}
    if empty := [name for number, name in enumerate(classes) if number not in used]:
        raise UserError(
            f"Each class must have images; the folder {empty[0]!r} of {spec!r} has none. Add some, or remove it."
        )
    if len(classes) < 2:
        raise UserError(
            f"A classifier needs two classes at least; {spec!r} has only {classes[0]!r}. Add another folder."
        )
    return tuple(classes)


def _folders(place: Path) -> list[Path]:
    """The folders in a folder that are not hidden."""
    if not place.is_dir():
        return []
    return sorted(inside for inside in place.iterdir() if inside.is_dir() and not inside.name.startswith("."))


def _images(place: Path) -> list[Path]:
    """The images in a folder and in those below it, without hidden ones; links to folders are not followed."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, inside, files in os.walk(place, onerror=fail):
        inside[:] = [name for name in inside if not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)
