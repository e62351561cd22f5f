"""The idx files of MNIST and its successors, compressed by gzip.

N images · H height · W width
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from convert.core.errors import UserError

IMAGES, LABELS = 0x0803, 0x0801  # unsigned bytes in three dimensions, in one
MAX_BYTES = 2**31  # of a file's content, many times what these sets have
MEND = "Get the file again"


def read_split(folder: Path, prefix: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W] and labels [N] of a split, both uint8: `prefix` is "train" or "t10k". Raises UserError for files
    that are missing, damaged, or do not belong together."""
    files = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    images, labels = (read(file, magic) for file, magic in zip(files, (IMAGES, LABELS), strict=True))
    if len(images) != len(labels):
        raise UserError(
            f"Each image needs a label; {files[0]} has {len(images):,} images and {files[1].name} {len(labels):,}"
            f" labels. {MEND}."
        )
    if not images.size or labels.max() >= num_classes:
        held = f"labels up to {labels.max()}" if images.size else "no images"
        raise UserError(f"There must be images of {num_classes} classes, from 0 on; {files[1]} has {held}. {MEND}.")
    return images, labels


def read(file: Path, magic: int) -> np.ndarray:
    """The array of an idx file that begins with `magic`."""
    start = 4 + 4 * (magic & 0xFF)
    try:
        with gzip.open(file, "rb") as opened:
            head = opened.read(start)
            if len(head) < start or struct.unpack(">I", head[:4])[0] != magic:
                raise UserError(
                    f"An idx file of this name begins with 0x{magic:08x} and its sizes; {file} begins with"
                    f" 0x{head[:4].hex()}. {MEND}."
                )
            shape = struct.unpack(f">{magic & 0xFF}I", head[4:])
            size = int(np.prod([int(n) for n in shape], dtype=object))
            if size > MAX_BYTES:
                raise UserError(f"An idx file holds at most {MAX_BYTES:,} bytes here; {file} claims {size:,}. {MEND}.")
            content = opened.read(size + 1)
    except FileNotFoundError:
        raise UserError(f"Fashion-MNIST needs the file {file}, which is not there. {MEND}.") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UserError(f"The file {file} cannot be read ({error}). {MEND}.") from None
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise UserError(f"The file {file} should hold {size:,} bytes after its head, and holds {more}. {MEND}.")
    return np.frombuffer(content, np.uint8).reshape(shape)
