"""Recordings on disk: what is read is what was written, and everything else is a sentence."""

import json

import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.data import recorded
from convert.data.batches import Batch
from convert.data.recorded import Recorded, RecordedBatches, Recording, record_type

KEPT = {"vocab_size": 99, "top_k": 3, "sample": 2}
BATCHES = {"seed": 0, "seq_len": 4, "batch_tokens": 8, "noise": 0.0, "steps": 5}
ABOUT = {"of": {"teacher": "t", "data": "d"}, "batches": BATCHES, "kept": KEPT}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Two steps in a part."""
    monkeypatch.setattr(recorded, "PART_TOKENS", 16)


def labels(step: int) -> torch.Tensor:
    """[2, 4], of which the tokens from another place on have no target."""
    found = torch.arange(8).view(2, 4) + step
    found[1, step % 4 + 1 :] = -100
    return found


def batches(step: int) -> Batch:
    return Batch(labels(step), labels(step), torch.arange(4).expand(2, -1))


def records(step: int) -> np.ndarray:
    count, rng = int((labels(step) != -100).sum()), np.random.default_rng(step)
    found = np.zeros(count, record_type(**KEPT))
    found["ids"] = rng.integers(0, 99, (count, 5))
    found["log_p"] = -rng.random((count, 4))
    found["negative_entropy"] = -rng.random(count)
    return found


def written(folder, parts=None, about=ABOUT):
    recording = Recording(folder, about)
    recording.begin()
    for number, steps in enumerate(recording.parts()):
        if parts is None or number in parts:
            recording.write(number, [records(step) for step in steps])
    if parts is None:
        recording.finish()
    return recording


def files(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_what_is_read_is_what_was_written_in_any_order(tmp_path):
    written(tmp_path / "a")
    with_teacher = RecordedBatches(batches, Recorded(tmp_path / "a"))
    for step in (0, 1, 4, 2, 3, 0):
        batch = with_teacher(step)
        has_target, expected = labels(step) != -100, records(step)
        for name, found in zip(("ids", "log_p", "negative_entropy"), batch.recorded, strict=True):
            assert np.array_equal(found[has_target].numpy(), expected[name]), (step, name)
            assert found.shape[:2] == (2, 4) and not found[~has_target].any()
        parts = batch.to("cpu").parts(4)
        assert len(parts) == 2 and all(len(part.recorded) == 3 for part in parts)
        assert torch.equal(torch.cat([part.recorded[0] for part in parts]), batch.recorded[0])


@pytest.mark.parametrize("vocab_size, bytes_of_ids", [(65_536, 2), (65_537, 4)])
def test_ids_take_the_fewest_bytes(vocab_size, bytes_of_ids):
    for sample in (0, 5):
        record = record_type(vocab_size, 64, sample)
        assert record.itemsize == bytes_of_ids * (64 + sample) + 2 * 65 + 4 * bool(sample)
        held = np.zeros(1, record)
        held["ids"] = vocab_size - 1
        assert (held["ids"] == vocab_size - 1).all()


def test_parts_cover_the_steps_once_and_are_not_too_many(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_PARTS", 3)
    for steps in (1, 2, 5, 100):
        parts = Recording("x", ABOUT | {"batches": BATCHES | {"steps": steps}}).parts()
        assert [step for part in parts for step in part] == list(range(steps)) and len(parts) <= 3
        assert len({len(part) for part in parts[:-1]}) <= 1


def test_an_unfinished_recording_goes_on_and_ends_the_same(tmp_path):
    written(tmp_path / "straight")
    folder = tmp_path / "killed"
    recording = written(folder, parts=(0, 2))
    (folder / "parts" / "00001.npy.writing-123").write_bytes(b"half")
    (folder / "parts" / "00001.npy").write_bytes(b"renamed, and no hash yet")
    with pytest.raises(UserError, match="names a finished recording of a teacher; .*killed is not finished"):
        Recorded(folder)
    assert [recording.is_whole(i) for i in range(3)] == [True, False, True]
    with pytest.raises(UserError, match="the first does not see .*00001.json, which another wrote. Give an --out on a"):
        recording.finish()
    again = Recording(folder, ABOUT)
    again.begin()
    again.write(1, [records(2), records(3)])
    again.finish()
    assert files(folder) == files(tmp_path / "straight")
    assert Recorded(folder).fingerprint == Recorded(tmp_path / "straight").fingerprint


def test_another_recording_has_another_fingerprint(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b", about=ABOUT | {"of": {"teacher": "u", "data": "d"}})
    assert Recorded(tmp_path / "a").fingerprint != Recorded(tmp_path / "b").fingerprint


@pytest.mark.parametrize(
    "part, wanted, words",
    [
        ("of", {"teacher": "other", "data": "d"}, "teacher: recorded t, now other"),
        ("of", {"teacher": "t", "tokenizer": "new", "data": "d"}, "tokenizer: recorded None, now new"),
        ("batches", BATCHES | {"seq_len": 8}, "seq_len: recorded 4, now 8"),
        ("batches", BATCHES | {"seed": 1}, "seed: recorded 0, now 1"),
        ("batches", BATCHES | {"noise": 0.1}, "noise: recorded 0.0, now 0.1"),
        ("batches", BATCHES | {"steps": 6}, "steps: recorded 5, now 6"),
        ("kept", {"vocab_size": 100}, "vocab_size: recorded 99, now 100"),
    ],
)
def test_a_recording_of_something_else_is_refused(part, wanted, words, tmp_path):
    written(tmp_path / "a")
    with pytest.raises(UserError, match=rf"is a recording of something else \({words}\). Record this with convert"):
        Recorded(tmp_path / "a").check(part, wanted)


def test_more_steps_than_wanted_are_no_difference(tmp_path):
    written(tmp_path / "a")
    for part, wanted in (("of", ABOUT["of"]), ("batches", BATCHES | {"steps": 2}), ("kept", {"vocab_size": 99})):
        Recorded(tmp_path / "a").check(part, wanted)


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    written(tmp_path / "a")
    with pytest.raises(UserError, match=r"recording of something else \(teacher: recorded t, now u\). Give another"):
        Recording(tmp_path / "a", ABOUT | {"of": {"teacher": "u", "data": "d"}}).begin()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="a folder of its own; .*b is none"):
        Recording(tmp_path / "b", ABOUT).begin()
    with pytest.raises(UserError, match="a folder of its own; .*notes.txt is none"):
        Recording(tmp_path / "b" / "notes.txt", ABOUT).begin()
    with pytest.raises(UserError, match="names a finished recording of a teacher; .*b holds none"):
        Recorded(tmp_path / "b")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["00001.npy", "00001.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.unlink()], ids=["bit", "gone"])
def test_a_damaged_part_is_named_and_written_anew(name, damage, tmp_path):
    recording = written(tmp_path / "a")
    before = files(tmp_path / "a")
    damage(tmp_path / "a" / "parts" / name)
    found = Recorded(tmp_path / "a")
    found(1, labels(1) != -100)  # of a part that is whole
    with pytest.raises(UserError, match=rf"{name}.* Repeat the convert.teach command that made it") as error:
        found(2, labels(2) != -100)
    assert "\n" not in str(error.value)
    assert [recording.is_whole(i) for i in range(3)] == [True, False, True]
    recording.write(1, [records(2), records(3)])
    assert files(tmp_path / "a") == before
    found(2, labels(2) != -100)


@pytest.mark.parametrize("name", ["recording.json", "DONE"])
def test_a_damaged_description_is_named(name, tmp_path):
    written(tmp_path / "a")
    file = tmp_path / "a" / name
    for content in (b"[]", b"{}", json.dumps(json.loads(file.read_bytes()) | {"layout": 7}).encode(), b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is missing or damaged. Repeat"):
            Recorded(tmp_path / "a")


def test_batches_with_other_targets_are_of_other_data(tmp_path):
    written(tmp_path / "a")
    with pytest.raises(
        UserError, match="has 5 tokens of step 0, and its batch has 8 targets: it was recorded of other"
    ):
        Recorded(tmp_path / "a")(0, torch.ones(2, 4, dtype=torch.bool))
