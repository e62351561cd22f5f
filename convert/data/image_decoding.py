"""Bytes of an image file -> pixels, whatever its format, colours and orientation are.

C channels · H height · W width
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485  # above these Pillow warns of a decompression bomb: 256 MiB in colours
GRAY = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")


def check_pillow() -> None:
    """Raise UserError where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError("Image files need the `pillow` package: pip install -e '.[images]'.") from None


def decoded(source: Path | bytes) -> "Image":
    """The first frame of an image, upright (EXIF), gray ("L") or in colours ("RGB").

    What is transparent becomes white (ours). Gray of 16 bits is scaled to 8, where Pillow would clip it. Raises
    whatever Pillow raises for a broken file, and ValueError for an image that is too large or whose values have no
    known range."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        if opened.width * opened.height > MAX_PIXELS:  # before anything is decoded
            raise ValueError(f"{opened.width:,} x {opened.height:,} pixels are more than {MAX_PIXELS:,}")
        opened.load()
        is_gray = opened.mode in GRAY
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("floating-point values have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if is_gray else "RGB")


def _eight_bits(image: "Image") -> "Image":
    """Gray of 16 bits as gray of 8."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("values of 32 bits have no known range")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def fitted(image: "Image", channels: int, height: int, width: int) -> np.ndarray:
    """The image as uint8 [C, H, W]: resized until it just covers this size (bicubic, antialiased), and the centre of
    that.

    So ImageNet is evaluated, but for the margin that torchvision's transforms cut off (256 -> 224): nothing is cut off
    an image of the right proportions."""
    from PIL import Image, ImageOps

    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image if channels == len(image.getbands()) else image.convert("RGB"))
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1))
