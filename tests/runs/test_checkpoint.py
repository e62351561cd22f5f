"""The folder of a step: what is read back is checked."""

from pathlib import Path

import pytest
import torch

from convert.core.errors import UserError
from convert.runs import checkpoint
from tests.conftest import tiny_teacher


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch, capsys):
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's storages are tagged
        folder.save(3, {"step": 3, "parameters": [torch.ones(4)]})
    assert folder.load()["parameters"][0].device.type == "cpu" and capsys.readouterr().out == ""
    file = folder.folder / "checkpoint-3.pt"
    torch.save({"code": Path("x")}, file)  # whole, and nothing that may be loaded
    file.with_suffix(".sha256").write_text(checkpoint.sha256(file))
    with pytest.raises(UserError, match="is what was written and cannot be read here"):
        folder.load()
    assert file.exists()


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
        folder.save(1, {"step": 1})
    assert list(folder.folder.iterdir()) == []
