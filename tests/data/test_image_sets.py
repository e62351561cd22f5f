"""Which images a name stands for, and what is refused in a sentence before anything is read."""

import os

import pytest

from convert.core.errors import UserError
from convert.data import image_sets
from convert.data.image_sets import image_set, whole_name
from tests.data.images import make_fashion, make_folder, pixels, save


def test_a_folder_has_its_classes_in_order_and_no_other_files(tmp_path):
    root = make_folder(tmp_path / "set", ("dog", "cat"), count=2)
    save(root / "cat" / "below" / "deep.JPG", pixels(4, 4, 1), format="JPEG")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._0.png").write_bytes(b"of another system")
    (root / ".cache").mkdir()
    found = image_set(str(root))
    assert found.class_names == ("cat", "dog") and not found.held_out and not found.is_sampled
    names = [(file.relative_to(root).as_posix(), label) for file, label in found.train]
    assert names == [("cat/0.png", 0), ("cat/1.png", 0), ("cat/below/deep.JPG", 0), ("dog/0.png", 1), ("dog/1.png", 1)]


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_a_folder_may_have_its_own_held_out_split(tmp_path, held_out):
    make_folder(tmp_path / "train", ("a", "b", "c"), count=3)
    make_folder(tmp_path / held_out, ("c", "a"), count=1)
    (tmp_path / "val" / "b").mkdir(parents=True, exist_ok=True)  # empty, as are the folders of some unpublished splits
    found = image_set(str(tmp_path))
    assert len(found.train) == 9 and [label for _, label in found.held_out] == [0, 2]
    assert all(file.parts[-3] == held_out for file, _ in found.held_out)


def test_a_class_may_be_called_train(tmp_path):
    assert image_set(str(make_folder(tmp_path / "vehicles", ("bus", "train")))).class_names == ("bus", "train")


def test_places_are_all_that_is_read(tmp_path):
    root, elsewhere = make_folder(tmp_path / "set", count=1), make_folder(tmp_path / "elsewhere", ("bird",), 1)
    (root / "bird").symlink_to(elsewhere / "bird")
    (root / "cat" / "link.png").symlink_to(elsewhere / "bird" / "0.png")
    assert set(image_set(str(root)).places()) == {
        root, root / "cat", root / "dog", root / "bird", root / "cat" / "link.png",
    }  # fmt: skip
    assert image_set("digits").places() == []
    assert [str(place) for place in image_set("hub:some/set:config").places()] == ["some/set"]


def test_fashion_mnist_is_found_where_it_is(tmp_path, monkeypatch):
    """The folder in FASHION_MNIST, that of Debian, the hub."""
    make_fashion(tmp_path / "given")
    monkeypatch.setattr(image_sets, "FASHION_FOLDER", tmp_path / "debian")
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    assert image_set("fashion-mnist").hub == ("zalando-datasets/fashion_mnist", None)
    (tmp_path / "debian").mkdir()
    assert image_set("fashion-mnist").places() == [tmp_path / "debian"]
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "given"))
    assert image_set("fashion-mnist").root == tmp_path / "given"
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="FASHION_MNIST must name a folder; there is none"):
        image_set("fashion-mnist")


def test_names_of_sets_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mine"):
        make_folder(tmp_path / name)
    assert whole_name("digits") == "digits" and image_set("digits").root is None
    assert whole_name("mine") == str(tmp_path / "mine") and whole_name("hub:some/set") == "hub:some/set"


WRONG = {
    "nothing-there": (None, "There are no images at .*Give 'digits', 'fashion-mnist', a folder"),
    "empty": ((), "must have a folder for each class, with images in it .* it has no folders"),
    "loose-images": (("1.png", "2.png"), "it has no folders"),
    "text": (("a/1.txt", "b/2.txt"), "it has no images in its folders"),
    "empty-class": (("a/1.png", "b/2.png", "c/"), "Each class must have images; the folder 'c' of .* has none"),
    "one-class": (("a/1.png", "a/2.png"), "needs two classes at least; .* has only 'a'"),
    "no-train": (("test/a/1.png", "test/b/2.png"), "A folder with test/ needs train/ beside it"),
    "other-class": (
        ("train/a/1.png", "train/b/2.png", "val/a/1.png", "val/c/1.png"),
        "Classes of .*val must be in train/, too; 'c' is not",
    ),
}


@pytest.mark.parametrize("names, message", WRONG.values(), ids=WRONG)
def test_folders_that_are_no_sets_are_refused(names, message, tmp_path):
    root = tmp_path / "set"
    if names is not None:
        root.mkdir()
    for name in names or ():
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            save(root / f"{name}.png", pixels(2, 2, 0)).rename(root / name)
    with pytest.raises(UserError, match=message) as caught:
        image_set(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["stdlib", "teacher", "teacher:prompts.jsonl"])
def test_text_is_no_set_of_images(spec):
    with pytest.raises(UserError, match="Images cannot be made of the text"):
        image_set(spec)


def test_files_and_hub_sets_without_a_name_are_refused(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="Images are read from folders; .*set.zip' is a file. Unpack it"):
        image_set(str(tmp_path / "set.zip"))
    with pytest.raises(UserError, match="written hub:NAME or hub:NAME:CONFIG; got 'hub:'"):
        image_set("hub:")
    with pytest.raises(UserError, match="must be"):
        image_set("")


@pytest.mark.parametrize("place", ["set", "set/cat"])
def test_a_folder_that_cannot_be_read_is_refused(place, tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set")
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == str(tmp_path / place):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in scandir(path)])
    with pytest.raises(UserError, match=r"cannot be read \(.*Permission denied.*Mend its permissions"):
        image_set(str(root))
