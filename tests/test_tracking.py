"""metrics.jsonl is whole and unique after a crash; W&B is offline without a key, silent, and can be read back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from convert.errors import UserError
from convert.tracking import Track


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    track = Track(tmp_path, mode="disabled", config={}, name="x")
    track.enter("align", 0, 0)
    track.resume(0)
    for step in (1, 2, 3):
        track.log(step, 10 * step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "align", "st')  # a kill in the middle of a line
    again = Track(tmp_path, mode="disabled", config={}, name="x")
    again.enter("align", 0, 0)
    again.resume(2)
    again.log(3, 30, {"train/loss": 33.0})
    again.enter("distill", 30, 3)
    again.resume(0)
    again.log(1, 10, {"train/loss": 0.5})
    assert [(r["stage"], r["step"], r["global_step"], r["tokens"], r["train/loss"]) for r in rows(tmp_path)] == [
        ("align", 1, 1, 10, 1.0), ("align", 2, 2, 20, 2.0), ("align", 3, 3, 30, 33.0), ("distill", 1, 4, 40, 0.5),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_without_an_answer_from_wandb_a_run_is_offline(tmp_path, monkeypatch, capsys):
    start = wandb.init

    def init(*, mode, **rest):
        if mode == "online":
            raise wandb.Error("no such host")
        return start(mode=mode, **rest)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    Track(tmp_path, mode=None, config={}, name="x").close()
    assert "W&B does not answer (no such host); this run is tracked offline." in capsys.readouterr().out
    with pytest.raises(UserError, match="must be reachable for --wandb online"):
        Track(tmp_path, mode="online", config={}, name="x")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Track(tmp_path, mode=None, config={}, name="x").wandb is None


def test_wandb_is_offline_silent_and_keeps_its_id(tmp_path, capfd):
    for _ in range(2):  # the second is a resumed run
        track = Track(tmp_path, mode=None, config={"target": "mamba", "lr": 1.0}, name="x")
        track.enter("align", 0, 0)
        track.resume(0)
        track.log(1, 10, {"train/loss": 1.5})
        track.summary({"ratio": 1.1})
        track.close()
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1
    wandb = Path(sys.executable).with_name("wandb")
    read = subprocess.run([wandb, "leet", "inspect", "--summary", "--json", files[0]], capture_output=True, text=True, check=True).stdout
    summary = json.loads(read)["summary"]
    assert summary["align/train/loss"] == 1.5 and summary["tokens"] == 10 and summary["step"] == 1 and summary["ratio"] == 1.1


def test_tables_and_the_page_are_in_the_run_file(tmp_path):
    (tmp_path / "report.html").write_text("<html></html>")
    (tmp_path / "model").mkdir()
    track = Track(tmp_path, mode="offline", config={"teacher": "neox-nano", "target": "mamba"}, name="x")
    track.enter("distill", 0, 0)
    for step in (1, 2):
        track.generations([{"task": "names", "prompt": "p", "teacher": "a", "student": str(step), "reference": "c"}])
        track.log(step, 10 * step, {"train/loss": 1.5})
    row = {"task": "names", "model": "student", "reading": "generation", "score": 0.5, "low": 0.2, "high": 0.7, "n": 4, "unparsable": 0.0}
    track.evaluation({"rows": [row], "gaps": [{"task": "names", "reading": "generation", "gap": 0.1}]}, tmp_path / "report.html")
    track.lineage("neox-nano", "abc", tmp_path / "model", "def", {"target": "mamba"})
    track.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).with_name("wandb")
    read = subprocess.run([wandb, "leet", "inspect", "--summary", "--json", file], capture_output=True, text=True, check=True).stdout
    summary = json.loads(read)["summary"]
    assert summary["gap/names/generation"] == 0.1 and summary["score/names/generation/student"] == 0.5
    assert summary["evaluation"]["nrows"] == 1 and summary["report"]["_type"] == "html-file"
    table = json.loads((file.parent / "files" / summary["generations"]["path"]).read_text())
    assert [line[table["columns"].index("student")] for line in table["data"]] == ["1", "2"]  # the history stays
