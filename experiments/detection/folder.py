"""Real pairs of images: a folder with the files of both bands, and their objects in COCO's format.

    FOLDER/visible/NAME, FOLDER/infrared/NAME     one file of each band, of the same name
    FOLDER/train.json, FOLDER/val.json            COCO: images, annotations with bbox [x, y, width, height], categories

M files · S side in pixels
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from convert.core.errors import UserError
from convert.core.files import parse_json
from experiments.detection.scenes import Pairs

BANDS = {"visible": "RGB", "infrared": "L"}


def read_pairs(folder: Path, split: str, side: int) -> Pairs:
    """The pairs of `split`, "train" or "val", each stretched to `side` pixels with its boxes. Raises UserError for
    files that are not there or do not decode, bands of different sizes, and boxes outside of their image."""
    file = folder / f"{split}.json"
    if not file.is_file():
        raise UserError(
            f"A folder of pairs has visible/, infrared/, train.json and val.json in COCO's format; {file} is not there."
        )
    labels = parse_json(file.read_bytes(), str(file))
    try:
        names = {row["id"]: str(row["name"]) for row in labels["categories"]}
        images = {row["id"]: str(row["file_name"]) for row in labels["images"]}
        objects = [(row["image_id"], row["category_id"], *map(float, row["bbox"])) for row in labels["annotations"]]
        boxes = {number: [row for row in objects if row[0] == number] for number in images}
        unknown = [row for row in objects if row[0] not in images or row[1] not in names or len(row) != 6]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not in COCO's format ({type(error).__name__}: {error}).") from error
    if unknown or not images:
        what = f"an annotation is {unknown[0]}" if unknown else "it has no images"
        raise UserError(f"Annotations in {file} must name images and categories of it; {what}.")
    order = {number: place for place, number in enumerate(sorted(names))}
    pixels, found, classes = [], list[Tensor](), list[Tensor]()
    for number, name in tqdm(images.items(), unit="pair"):
        bands, width, height = _read(folder, name, side)
        pixels.append(bands)
        found.append(_boxes(file, name, boxes[number], width, height, side))
        classes.append(torch.tensor([order[row[1]] for row in boxes[number]], dtype=torch.int64))
    stacked = torch.stack(pixels)
    class_names = tuple(names[number] for number in sorted(names))
    return Pairs(stacked[:, :3], stacked[:, 3:], tuple(found), tuple(classes), class_names)


def _read(folder: Path, name: str, side: int) -> tuple[Tensor, int, int]:
    """uint8 [4, S, S], and the width and height of the files."""
    read = []
    for band, mode in BANDS.items():
        file = folder / band / name
        try:
            with Image.open(file) as image:
                read.append(image.convert(mode))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"Each pair has a readable file in {folder / band}; {file}: {error}.") from error
    visible, infrared = read
    if visible.size != infrared.size:
        raise UserError(
            f"The bands of a pair must have one size; {name} has {visible.size} in visible and {infrared.size} in"
            " infrared. Register them first."
        )
    resized = [np.atleast_3d(np.asarray(each.resize((side, side), Image.Resampling.BILINEAR))) for each in read]
    return torch.from_numpy(np.concatenate(resized, -1)).permute(2, 0, 1).contiguous(), *visible.size


def _boxes(file: Path, name: str, rows: list[tuple], width: int, height: int, side: int) -> Tensor:
    """[n, 4] left, top, right and bottom, in pixels of the stretched image."""
    found = torch.tensor([(x, y, x + w, y + h) for _, _, x, y, w, h in rows], dtype=torch.float64).reshape(-1, 4)
    limits = torch.tensor([width, height, width, height], dtype=torch.float64)
    is_wrong = (found < 0).any(-1) | (found > limits).any(-1) | (found[:, 2:] <= found[:, :2]).any(-1)
    if is_wrong.any():
        box = rows[int(is_wrong.nonzero()[0, 0])][2:]
        raise UserError(
            f"A box must lie within its image and enclose something; {file} has {list(box)} in {name}, which is"
            f" {width} x {height}."
        )
    return (found / limits * side).float()
