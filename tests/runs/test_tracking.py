"""metrics.jsonl is whole and unique after a crash; W&B is offline without a key, silent, and can be read back."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from convert.core.errors import UserError
from convert.runs import wandb_sink
from convert.runs.evaluation_schemas import Evaluation, Gap, Score
from convert.runs.tracking import Track


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


def test_a_cut_line_is_mended_at_opening_and_damage_is_named_before_anything_is_trained(tmp_path, capsys):
    track = Track(tmp_path, mode="disabled", config={}, name="x")
    track.enter("align")
    for step in (1, 2, 3):
        track.log(step, 10 * step, {"train/loss": float(step)})
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    again = Track(tmp_path, mode="disabled", config={}, name="x")
    assert "line 3 was cut short" in capsys.readouterr().out
    again.enter("align")
    again.resume(3)  # as from a checkpoint whose lines are lost
    assert "lacks 1 of the 3 lines of align, from step 3 on" in capsys.readouterr().out
    again.log(4, 40, {"train/loss": 4.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4]
    for damage, words in (
        (b"\0" * 50, "Line 1 of .* is not JSON"),
        (b'{"stage": "align", "step": "1", "tokens": 2}', "row 1, is damaged: step should be"),
    ):
        file.write_bytes(damage + b"\n" + whole)
        with pytest.raises(UserError, match=words):
            Track(tmp_path, mode="disabled", config={}, name="x")


NAMES = ["x" * 70, "a/b:c\\#?%", "\udcff\udcfe", "名前" * 80, " ", "[red]", "a\nb\x1b[31m", "x" * 300, "..", ""]


@pytest.mark.filterwarnings("ignore")
def test_runs_are_tracked_under_any_name(tmp_path, capsys):
    """Of the teacher's folder, the target, the run, the stage and the architecture."""
    for number, name in enumerate(NAMES[1:6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = {"teacher": f"/models/{name}", "target": name or "mamba", "size": 10**30, "rate": float("nan")}
        track = Track(folder, mode="offline", config=config, name=name)
        track.enter(f"align {name}")
        track.log(1, 128, {"train/loss": 1.0})
        track.made("abc", {"architecture": name}, folder)
        assert track.dashboard is not None and track.dashboard.run is not None, name
        track.close()
    assert "W&B failed" not in capsys.readouterr().out
    assert len({wandb_sink._plain(name) for name in NAMES}) == len(NAMES) and all(
        0 < len(wandb_sink._plain(name)) <= 64 for name in NAMES
    )


def read_back(file: Path) -> dict:
    """The summary of a run's file, by W&B's own reader."""
    wandb = Path(sys.executable).with_name("wandb")
    read = subprocess.run(
        [wandb, "leet", "inspect", "--summary", "--json", file], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(read)["summary"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("answers", [True, False])
def test_without_an_answer_from_wandb_a_run_is_offline(tmp_path, monkeypatch, capsys, answers):
    start = wandb.init

    def init(*, mode, **rest):
        if mode == "online":
            raise wandb.Error("no such host")
        return start(mode=mode, **rest)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_sink, "answers", lambda address: answers)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    track = Track(tmp_path, mode=None, config={}, name="x")
    track.enter("align")
    assert track.dashboard.run.offline
    track.enter("distill")  # not asked again
    track.close()
    assert capsys.readouterr().out.count("W&B does not answer") == 1
    with pytest.raises(UserError, match="must be reachable for --wandb online"):
        Track(tmp_path, mode="online", config={}, name="x").enter("align")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Track(tmp_path, mode=None, config={}, name="x").dashboard is None


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_takes_connections_and_says_nothing_costs_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(wandb_sink.PATIENCE, "init_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        track = Track(tmp_path, mode=None, config={}, name="x")
        started = time.monotonic()
        track.enter("align")
        track.log(1, 10, {"train/loss": 1.5})
        track.close()
    assert time.monotonic() - started < 60 and [row["train/loss"] for row in rows(tmp_path)] == [1.5]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert read_back(file)["train/loss"] == 1.5


def test_wandb_is_offline_silent_and_keeps_its_id(tmp_path, capfd):
    for _ in range(2):  # the second is a resumed run
        track = Track(tmp_path, mode=None, config={"target": "mamba", "lr": 1.0}, name="x")
        track.enter("align", 0, 0)
        track.resume(0)
        track.log(1, 10, {"train/loss": 1.5})
        assert (track.dashboard.run.group, track.dashboard.run.job_type) == (f"x {track.dashboard.id}", "align")
        track.close()
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1
    summary = read_back(files[0])
    assert summary["train/loss"] == 1.5 and summary["tokens"] == 10 and summary["step"] == 1


def test_stages_are_runs_with_tables_artifacts_and_the_page(tmp_path):
    (tmp_path / "report.html").write_text("<html></html>")
    (tmp_path / "model").mkdir()
    track = Track(
        tmp_path,
        mode="offline",
        config={"teacher": "neox-nano", "target": "mamba", "teacher_fingerprint": "abc"},
        name="x",
    )
    for stage, before in (("align", 0), ("distill", 2)):
        track.enter(stage, 10 * before, before)
        for step in (1, 2):
            track.generations(
                [{"task": "names", "prompt": "p", "teacher": "a", "student": f"{stage} {step}", "reference": "c"}]
            )
            track.log(step, 10 * step, {"train/loss": 1.5})
        track.made(f"after {stage}"[-5:], {"architecture": "linear"})
    track.enter("evaluate")
    track.made("def", {"architecture": "mamba"}, tmp_path / "model")
    rows = [
        Score(task="names", model=model, scoring=scoring, score=0.5, low=0.2, high=0.7, n=4, unparsable=0.0)
        for model in ("teacher", "student")
        for scoring in ("generation", "likelihood")
    ]
    gaps = [
        Gap(task="names", scoring=scoring, gap=0.1, low=0.0, high=0.2, n=4) for scoring in ("generation", "likelihood")
    ]
    found = Evaluation(rows=rows, gaps=gaps, models={})
    track.finish(found, tmp_path / "report.html", {"perplexity_ratio": 1.1})
    track.close()
    files = {file.stem.split("-")[-1]: file for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert set(files) == {"align", "distill", "evaluate"}
    distilled, evaluated = read_back(files["distill"]), read_back(files["evaluate"])
    assert distilled["tokens"] == 40 and distilled["step"] == 4  # the axes go on from stage to stage
    assert (
        evaluated["gap/names/generation"] == 0.1
        and evaluated["score/names/generation/student"] == 0.5
        and evaluated["perplexity_ratio"] == 1.1
    )
    assert evaluated["evaluation"]["nrows"] == 4 and evaluated["report"]["_type"] == "html-file"
    table = json.loads((files["distill"].parent / "files" / distilled["generations"]["path"]).read_text())
    column = table["columns"].index("student")
    # the history stays
    assert [line[column] for line in table["data"]] == ["align 1", "align 2", "distill 1", "distill 2"]
    chain = b"".join(file.read_bytes() for file in files.values())
    assert chain.count(b"made_from") >= 3 and track.model == "def"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["log", "use_artifact", "log_artifact", "finish"])
def test_wandb_may_fail_as_it_likes(tmp_path, monkeypatch, capsys, what):
    def fail(*_, **__):
        raise ValueError("the server is on fire")

    track = Track(tmp_path, mode="offline", config={"teacher_fingerprint": "abc"}, name="x")
    track.enter("align")
    monkeypatch.setattr(type(track.dashboard.run), what, fail)
    if what == "use_artifact":  # which is not called offline
        monkeypatch.setattr(type(track.dashboard.run), "offline", False)
    track.log(1, 10, {"train/loss": 1.5})
    track.made("def", {})
    track.enter("distill")
    track.log(1, 10, {"train/loss": 0.5})
    track.close()
    assert [row["train/loss"] for row in rows(tmp_path)] == [1.5, 0.5] and track.model == "def"
    assert capsys.readouterr().out.count("the server is on fire") == 1
    monkeypatch.undo()
    wandb.teardown()
