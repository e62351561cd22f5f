"""Files of every kind of colours and orientation become the pixels they show."""

import io

import numpy as np
import pytest
from PIL import Image

from convert.data import image_decoding
from convert.data.image_decoding import decoded, fitted
from tests.data.images import pixels


def written(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


COLOURS = pixels(5, 7, 0)
GRAY = pixels(5, 7, 1, 1)
PNG = written(Image.fromarray(COLOURS))


def test_colours_and_gray_stay_as_they_are():
    assert np.array_equal(np.asarray(decoded(written(Image.fromarray(COLOURS)))), COLOURS)
    assert np.array_equal(np.asarray(decoded(written(Image.fromarray(GRAY)))), GRAY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_gray_are_scaled_and_not_clipped(kind):
    values = (np.arange(35).reshape(5, 7) * 1927).astype(np.uint16)
    found = np.asarray(decoded(written(Image.fromarray(values), kind)))
    assert np.array_equal(found, np.round(values / 257).astype(np.uint8))


def test_transparent_parts_are_white_in_every_mode():
    alpha = np.where(np.arange(7) < 3, 0, 255).astype(np.uint8) + np.zeros((5, 1), np.uint8)
    for colours in (COLOURS, GRAY[..., None]):
        found = np.asarray(decoded(written(Image.fromarray(np.dstack([colours, alpha]).squeeze()))))
        assert (found[:, :3] == 255).all()
        assert np.array_equal(found[:, 3:], colours[:, 3:].squeeze())
    palette = Image.fromarray(GRAY % 4, "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    found = np.asarray(decoded(written(palette, transparency=2)))
    assert (found[GRAY % 4 == 2] == 255).all() and (found[GRAY % 4 == 3] == (100, 110, 120)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    """Each of the eight orientations of EXIF, against its definition."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = COLOURS
    upright = {
        1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: np.rot90(a, -1),
        7: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(a),
    }  # fmt: skip
    assert np.array_equal(np.asarray(decoded(written(Image.fromarray(a), exif=exif))), upright[orientation])


def test_other_spaces_of_colours_become_rgb():
    for mode, kind in (("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("1", "PNG")):
        image = Image.fromarray(COLOURS).convert(mode)
        assert decoded(written(image, kind)).mode == ("L" if mode == "1" else "RGB")


def test_the_first_frame_of_an_animation_is_meant():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = decoded(written(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert set(found.getdata()) == {(255, 0, 0)}


def test_what_is_too_large_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 34)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match="7 x 5 pixels are more than 34"):
        decoded(PNG)


def test_values_without_a_range_are_refused():
    with pytest.raises(ValueError, match="no known range"):
        decoded(written(Image.fromarray(np.linspace(0, 9, 35, dtype=np.float32).reshape(5, 7)), "TIFF"))
    with pytest.raises(ValueError, match="no known range"):
        decoded(written(Image.fromarray(np.full((5, 7), 1 << 20, np.int32)), "TIFF"))


@pytest.mark.parametrize("size, box", [((8, 8), (4, 0, 12, 8)), ((4, 8), (6, 0, 10, 8)), ((4, 4), None)])
def test_the_centre_is_kept_at_the_wanted_proportions(size, box):
    """An image twice as wide as high, whose columns have values of their own."""
    image = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 15, (8, 1)))
    width, height = size
    found = fitted(image, 3, height, width)
    assert found.shape == (3, height, width) and (found == found[:1]).all()
    if box:
        assert np.array_equal(found[0], np.asarray(image.crop(box)))
    else:  # half the size of the middle
        middle = np.asarray(image.crop((4, 0, 12, 8)).resize((4, 4), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(found[0][:, 1:-1] - middle[:, 1:-1]).max() <= 1
