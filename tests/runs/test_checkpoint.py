"""The folder of a step: what is read back is checked."""

import pickle
import signal
from pathlib import Path

import pytest
import torch

from convert.core.errors import UserError
from convert.core.files import sha256, write_json
from convert.runs import checkpoint
from tests.conftest import tiny_teacher

STATE = {"step": 3, "lr": 0.1, "parts": {"w": {"value": torch.arange(4.0)}}, "rng": [torch.arange(3)], "of": {}}


def folder_with_a_checkpoint(run: Path) -> tuple[checkpoint.StepFolder, Path]:
    folder = checkpoint.StepFolder(run, 2, "distill")
    folder.save(3, STATE)
    return folder, folder.folder / "checkpoint-3"


def test_what_is_read_is_what_was_written_also_by_a_gpu(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's storages are tagged
        folder, files = folder_with_a_checkpoint(tmp_path)
    found = folder.load()
    assert torch.equal(found["parts"]["w"]["value"], torch.arange(4.0)) and found["rng"][0].tolist() == [0, 1, 2]
    assert {key: found[key] for key in ("step", "lr", "of")} == {"step": 3, "lr": 0.1, "of": {}}
    assert capsys.readouterr().out == ""


class Evil:
    def __reduce__(self):
        return print, ("evil ran",)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_no_code_in_a_checkpoint_runs(name, tmp_path, capsys):
    """Also where the hashes fit: who sent the folder wrote those, too."""
    folder, files = folder_with_a_checkpoint(tmp_path)
    if name == ".metadata":
        (files / name).write_bytes(pickle.dumps(Evil()))
    else:
        torch.save(Evil(), files / name)
    write_json(files / "sha256.json", {file.name: sha256(file) for file in files.glob("[!s]*")})
    with pytest.raises(UserError, match="is what was written and cannot be read here"):
        folder.load()
    assert "evil" not in capsys.readouterr().out and files.exists()


def test_a_part_that_is_missing_or_changed_sets_the_checkpoint_aside(tmp_path, capsys):
    for name in (".metadata", "__0_0.distcp", "state.json", "sha256.json"):
        folder, files = folder_with_a_checkpoint(tmp_path)
        (files / name).unlink()
        assert folder.load() is None and "is damaged; it was set aside" in capsys.readouterr().out
        assert not files.exists()


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path):
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    folder.folder.mkdir(parents=True)
    (folder.folder / "checkpoint-40.pt").touch()
    with pytest.raises(UserError, match="checkpoint-40.pt is a file of an earlier version .* starts again"):
        folder.load()


def test_a_damaged_result_is_named_wherever_it_is_read(tmp_path):
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    folder.folder.mkdir(parents=True)
    (folder.folder / "DONE").write_text("{")
    with pytest.raises(UserError, match="^The result .* is damaged. Start again with --fresh; "):
        folder.student(tiny_teacher("gpt_neox"))
    (tmp_path / "steps" / "1-align" / "student").mkdir(parents=True)
    # what the step starts from is still there
    (tmp_path / "steps" / "1-align" / "student" / "model.safetensors").touch()
    with pytest.raises(
        UserError,
        match="^The result .* is damaged. Delete that file to do the step again, or start again with --fresh; ",
    ):
        folder.result()


def test_a_checkpoint_without_room_for_its_digest_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    with pytest.raises(UserError, match="Free some space; the same command goes on from the last one."):
        folder.save(1, {"step": 1, "of": torch.ones(1)})
    assert list(folder.folder.iterdir()) == []


def test_signals_that_come_together_are_one_request_to_stop(monkeypatch):
    """As Ctrl-C in a terminal comes to each process of torchrun's group, and then from torchrun."""
    with checkpoint.StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.requested
        monkeypatch.setattr(checkpoint, "TOGETHER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
