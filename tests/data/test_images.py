"""Images are read once, as what they show, with every image that does not decode named."""

import gzip
import io
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from convert.core.errors import UserError
from convert.data import image_files
from convert.data.idx import read_split
from convert.data.image_sets import image_set
from convert.data.images import read_images
from tests.data.images import idx, make_fashion, make_folder, pixels, save


def read(place, **options):
    return read_images(image_set(str(place)), **options)


def everything(data) -> dict:
    """The pixels and labels of both splits, as what can be compared."""
    return {
        name: (part.read(range(len(part))).tolist(), part.labels.tolist())
        for name, part in (("train", data.train), ("held_out", data.held_out))
    }


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = read_images(image_set("digits"))
    assert (len(data.train), len(data.held_out), data.channels, data.size) == (1297, 500, 1, (8, 8))
    given = load_digits()
    for part in (data.train, data.held_out):
        found = part.read(range(len(part)))[:, 0].double() / 255 * 16
        assert np.abs(found.numpy() - given.images[part.rows]).max() <= 16 / 255 / 2
        assert np.array_equal(part.labels, given.target[part.rows]) and bool(part.known.all())
    assert sorted([*data.train.rows, *data.held_out.rows]) == list(range(1797))
    share = torch.bincount(data.held_out.labels) / np.bincount(given.target)
    assert float(share.min()) > 0.275 and float(share.max()) < 0.282  # 500 / 1797 = 0.278
    assert data.held_out.rows[:4].tolist() == read_images(image_set("digits")).held_out.rows[:4].tolist()


def test_fashion_mnist_keeps_its_own_split(tmp_path, monkeypatch):
    arrays = make_fashion(tmp_path)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    data = read_images(image_set("fashion-mnist"))
    assert len(data.class_names) == 10 and (data.channels, data.size) == (1, (4, 3))
    for part, prefix in ((data.train, "train"), (data.held_out, "t10k")):
        assert np.array_equal(part.read(range(len(part)))[:, 0], arrays[f"{prefix}-images-idx3-ubyte.gz"])
        assert np.array_equal(part.labels, arrays[f"{prefix}-labels-idx1-ubyte.gz"])


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
FOUR = np.zeros((4, 2, 2), np.uint8)
BROKEN = {
    "missing": (LABELS, None, "needs the file .*train-labels.*, which is not there"),
    "no-gzip": (IMAGES, b"\0\0\x08\x03", r"cannot be read \(Not a gzipped file"),
    "cut-gzip": (IMAGES, gzip.compress(idx(0x803, FOUR))[:-6], "cannot be read"),
    "flipped-bit": (IMAGES, gzip.compress(idx(0x803, FOUR))[:-8] + b"\1" * 8, r"cannot be read \(CRC check failed"),
    "magic": (LABELS, gzip.compress(idx(0x803, FOUR)), "begins with 0x00000801 .* begins with 0x00000803"),
    "empty": (LABELS, gzip.compress(b""), "begins with 0x00000801 and its sizes"),
    "too-short": (IMAGES, gzip.compress(idx(0x803, FOUR)[:-1]), "should hold 16 bytes after its head, and holds 15"),
    "too-long": (
        IMAGES,
        gzip.compress(idx(0x803, FOUR) + b"\0"),
        "should hold 16 bytes after its head, and holds more",
    ),
    "enormous": (IMAGES, gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12), "holds at most .* claims"),
    "counts": (IMAGES, gzip.compress(idx(0x803, FOUR)), "Each image needs a label; .* 4 images and .* 40 labels"),
    "classes": (LABELS, gzip.compress(idx(0x801, np.full(40, 10, np.uint8))), "of 10 classes, .* has labels up to 10"),
}


@pytest.mark.parametrize("name, content, message", BROKEN.values(), ids=BROKEN)
def test_broken_idx_files_are_refused_in_a_sentence(name, content, message, tmp_path):
    make_fashion(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_split(tmp_path, "train", 10)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_as_it_is(tmp_path):
    """Images of one size that is no larger than wanted stay as they are; a tenth of each class is held out."""
    root = make_folder(tmp_path / "set", ("a", "b", "c"), count=20)
    data = read(root)
    assert (data.channels, data.size, data.class_names, data.skipped) == (3, (6, 5), ("a", "b", "c"), ())
    assert torch.bincount(data.held_out.labels).tolist() == [2, 2, 2] and len(data.train) == 54
    files = image_set(str(root)).train
    for part in (data.train, data.held_out):
        for i, row in enumerate(part.rows):
            file, label = files[row]
            assert label == part.labels[i]
            assert np.array_equal(part.read([i])[0].permute(1, 2, 0), np.asarray(Image.open(file)))


def test_images_of_many_sizes_get_the_wanted_one(tmp_path):
    root = make_folder(tmp_path / "set", channels=1)
    assert (read(root).channels, read(root, size=(4, 4)).size) == (1, (4, 4))
    save(root / "dog" / "last.png", pixels(9, 9, 1))  # of colours, and larger
    data = read(root, size=(7, 8))
    assert (data.channels, data.size, len(data.train) + len(data.held_out)) == (3, (7, 8), 21)


def test_the_second_reading_is_from_the_cache_and_the_root_does_not_matter(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set")
    first = read(root)
    monkeypatch.setattr(image_files, "decoded", None)
    elsewhere = shutil.copytree(root, tmp_path / "quite" / "another place")
    second = read(elsewhere)
    assert second.fingerprint == first.fingerprint and everything(second) == everything(first)
    monkeypatch.undo()


def test_the_key_follows_images_classes_split_and_size(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "train")
    keys = [read(tmp_path / "train").fingerprint, read(root, size=(4, 4)).fingerprint]
    make_folder(tmp_path / "test", count=2)
    keys.append(read(tmp_path).fingerprint)
    (root / "dog" / "3.png").rename(root / "cat" / "dog3.png")
    keys.append(read(tmp_path).fingerprint)
    save(root / "dog" / "4.png", pixels(6, 5, 77))
    keys.append(read(tmp_path).fingerprint)
    (root / "dog").rename(root / "wolf")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    keys.append(read(tmp_path).fingerprint)
    assert len(set(keys)) == len(keys)


def test_a_damaged_cache_is_rebuilt(tmp_path, cache, capsys):
    root = make_folder(tmp_path / "set")
    good = read(root)
    file = cache.parent / "images" / good.fingerprint / "pixels.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    assert everything(read(root)) == everything(good)
    assert "is damaged (pixels.npy changed)" in capsys.readouterr().out


def test_images_that_do_not_decode_are_named_skipped_and_counted(tmp_path, capsys):
    """Of 250, two may: 1 %. The third one stops the run, and leaves nothing in the cache."""
    root = make_folder(tmp_path / "set", count=125)
    whole = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "7.png").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "9.png").write_text("no image at all")
    for _ in range(2):  # decoded, and from the cache
        data = read(root)
        assert data.skipped == ("cat/7.png", "dog/9.png") and len(data.train) + len(data.held_out) == 248
        said = capsys.readouterr().out
        assert "2 images of" in said and "'cat/7.png' (" in said and "'dog/9.png' (no image of a known format)" in said
    (root / "dog" / "8.png").unlink()
    (root / "dog" / "8.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"At most 1% .* 3 of 250 do, the first of them 'cat/7.png' \(.*Mend or remove"):
        read(root)


def test_a_class_without_an_image_that_decodes_stops(tmp_path, cache):
    root = make_folder(tmp_path / "set", count=200)
    save(root / "bird" / "0.png", pixels(6, 5, 3)).write_bytes(b"broken")
    with pytest.raises(UserError, match="Each class needs an image that decodes; 'bird' of .* has none: 'bird/0.png'"):
        read(root)
    assert list((cache.parent / "images").iterdir()) == []


def test_a_class_of_one_image_has_none_to_hold_out(tmp_path):
    root = make_folder(tmp_path / "set")
    save(root / "bird" / "0.png", pixels(6, 5, 3))
    with pytest.raises(UserError, match="two images at least, one of them held out; 'bird' has 1"):
        read(root)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="kept decoded, in 0.0 GiB; .* has 0.0 GiB left. Free some space"):
        read(root)


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_a_share_of_the_labels_is_known_in_each_class(share):
    first, again, other = (read_images(image_set("digits"), labels=share, seed=seed) for seed in (0, 0, 1))
    sizes = torch.bincount(first.train.labels).tolist()
    assert torch.bincount(first.train.labels[first.train.known]).tolist() == [math.ceil(share * n) for n in sizes]
    assert bool(first.held_out.known.all()) and first.fingerprint == other.fingerprint
    assert torch.equal(first.train.known, again.train.known)
    assert torch.equal(first.train.known, other.train.known) == (share == 1)


def test_a_share_that_leaves_a_class_without_a_label_is_refused(tmp_path):
    for share in (0.0, 0.005):
        with pytest.raises(UserError, match=r"leave each class one at least; .* Give 0\.008 or more"):
            read_images(image_set("digits"), labels=share)
    read_images(image_set("digits"), labels=0.008)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="labels must be"):
            read_images(image_set("digits"), labels=share)


@pytest.mark.parametrize("package, spec", [("sklearn.datasets", "digits"), ("PIL", "folder")])
def test_a_missing_package_is_said_in_a_sentence(package, spec, tmp_path, monkeypatch):
    place = make_folder(tmp_path / "set") if spec == "folder" else spec
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"need the `[\w-]+` package: pip install -e '.\[images\]'"):
        read(place)


@pytest.fixture
def hub(tmp_path):
    """A function that writes a data set as a folder of a hub's layout, which `datasets` reads without network."""
    datasets = pytest.importorskip("datasets")

    def write(splits, labels=("fine", "coarse")):
        for split, count in splits.items():
            rows = {"picture": [{"bytes": _png(i), "path": None} for i in range(count)]}
            kinds = {"picture": datasets.Image()}
            for number, column in enumerate(labels):
                classes = 4 - 2 * number
                rows[column] = [i % classes for i in range(count)]
                kinds[column] = datasets.ClassLabel(names=[f"{column}{i}" for i in range(classes)])
            place = tmp_path / "hub" / "data"
            place.mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
            table.to_parquet(place / f"{split}-00000-of-00001.parquet")
        return image_set(f"hub:{tmp_path / 'hub'}")

    return write


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(6, 5, seed)).save(file, "PNG")
    return file.getvalue()


def test_a_hub_set_is_read_by_its_columns(hub):
    """Of two columns of labels, the finer is meant."""
    data = read_images(hub({"train": 24, "test": 8}))
    assert data.class_names == ("fine0", "fine1", "fine2", "fine3") and (data.channels, data.size) == (3, (6, 5))
    assert (len(data.train), len(data.held_out)) == (24, 8)
    assert data.train.labels.tolist() == [i % 4 for i in range(24)]
    assert np.array_equal(data.train.read([5])[0].permute(1, 2, 0), pixels(6, 5, 5))


def test_a_hub_set_without_labels_or_training_split_is_refused(hub, tmp_path):
    with pytest.raises(UserError, match=r"one column of images and one of class labels; .* picture \(Image\)"):
        read_images(hub({"train": 4}, labels=()))
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError, match="needs a split 'train'; .* has test"):
        read_images(hub({"test": 4}))
