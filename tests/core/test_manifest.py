"""What was written is known by its hash: a flipped bit is named, what grows may grow, and nothing is called damaged
that a kill interrupted."""

import json

import pytest

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.files import sealed, unsealed
from convert.models.catalog import NANO

FILES = ("model/weights", "model/sub/config", "report.json", "rows.jsonl")


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    manifest.record(tmp_path, "model", "report.json", "rows.jsonl", "never.json")
    return tmp_path


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("at", [0, 17, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named_with_a_way_out(folder, name, at):
    manifest.check(folder, *FILES, "model")
    flip(folder / name, at)
    manifest.check(folder, *{*FILES} - {name})  # the others are sound
    with pytest.raises(UserError, match=rf"^{folder / name} is not what was written: .*\. \w.*\.$"):
        manifest.check(folder, name.split("/")[0])


def test_what_grows_may_grow_and_nothing_else(folder):
    for name in ("rows.jsonl", "report.json"):
        with (folder / name).open("ab") as file:
            file.write(b"more")
    manifest.check(folder, "rows.jsonl", "model")
    with pytest.raises(UserError, match=r"report\.json is not what was written"):
        manifest.check(folder, "report.json")
    (folder / "rows.jsonl").write_bytes(b"rows")
    with pytest.raises(UserError, match=r"rows\.jsonl is not what was written"):
        manifest.check(folder, "rows.jsonl")


def test_killed_while_a_file_is_written_it_is_unknown_and_not_damaged(folder):
    with pytest.raises(KeyboardInterrupt), manifest.renewing(folder, "report.json", "model"):
        (folder / "report.json").write_text("half")
        (folder / "model/weights").write_text("new")
        raise KeyboardInterrupt
    manifest.check(folder, *FILES)
    with manifest.renewing(folder, "model"):
        (folder / "model/weights").write_text("newer")
    manifest.check(folder, *FILES)
    flip(folder / "model/weights", 0)
    with pytest.raises(UserError, match="model/weights is not what was written"):
        manifest.check_model(folder / "model")


def test_a_folder_copied_away_is_not_held_to_anything(folder, tmp_path_factory):
    elsewhere = (folder / "model").rename(tmp_path_factory.mktemp("away") / "model")
    flip(elsewhere / "weights", 3)
    manifest.check_model(elsewhere)
    manifest.check(folder, "model")  # a whole folder that is gone is not called damaged


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_not_what_was_written(folder, name):
    (folder / name).unlink()
    manifest.check(folder, *{*FILES} - {name})
    with pytest.raises(UserError, match=rf"^{folder / name} is not what was written: it is missing, .*\. \w.*\.$"):
        manifest.check(folder, name.split("/")[0])


@pytest.mark.parametrize("name", ["answers.jsonl", "evaluation.json", "context.json"])
def test_what_is_made_again_when_it_is_removed_may_be_missing(tmp_path, name):
    (tmp_path / name).write_text("{}")
    manifest.record(tmp_path, name)
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="Remove it"):
        manifest.check(tmp_path, name)
    (tmp_path / name).unlink()
    manifest.check(tmp_path, name)


def test_a_kill_before_a_file_is_there_again_is_no_damage(folder):
    with pytest.raises(KeyboardInterrupt), manifest.renewing(folder, "report.json", "model"):
        (folder / "report.json").unlink()
        (folder / "model/weights").unlink()
        raise KeyboardInterrupt
    manifest.check(folder, *FILES, "model")


def test_a_card_is_for_people_to_edit(folder):
    card = folder / "model" / manifest.CARD
    card.write_text("a card")
    manifest.record(folder, "model")
    earlier = folder / manifest.NAME
    entries = unsealed(json.loads(earlier.read_text()))["files"]
    assert f"model/{manifest.CARD}" not in entries
    card.write_text("edited")
    manifest.check(folder, "model")
    entries[f"model/{manifest.CARD}"] = {"bytes": 6, "sha256": "0" * 64}  # as earlier versions recorded it
    earlier.write_text(json.dumps(sealed({"files": entries})))
    manifest.check(folder, "model")


def test_a_flipped_bit_of_the_hashes_themselves_is_said(folder):
    file = folder / manifest.NAME
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        flip(file, at)
        if file.read_bytes().split() != whole.split():  # white space is no content
            with pytest.raises(
                UserError, match="damaged, so nothing beside them can be checked|is not what was written"
            ):
                manifest.check(folder, *FILES, "model")
        file.write_bytes(whole)


def test_what_is_sealed_shows_any_change():
    content = {"loss": 0.25, "rows": [1, 2], 3: "text"}
    assert unsealed(sealed(content)) == {"loss": 0.25, "rows": [1, 2], "3": "text"}
    with pytest.raises(ValueError, match="not what was written"):
        unsealed(sealed(content) | {"loss": 0.75})


def test_the_embedded_teacher_is_as_it_was_recorded():
    """After a change of it: python -m convert.core.manifest convert nano."""
    assert {
        f"nano/{file.name}" for file in NANO.iterdir() if file.is_file() and file.name != manifest.CARD
    } <= manifest._read(NANO.parent).keys()
    manifest.check_model(NANO)
