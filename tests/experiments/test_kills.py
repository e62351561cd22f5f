"""Kills of runs: which instants are drawn, what a folder shows of its run, and that a run that lost something shows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import kills

PHASES = [
    ("start", 9.0), ("linear", 0.5), ("save of linear", 0.1), ("align", 1.0), ("save of align", 0.2), ("align", 2.0),
    ("save of align", 0.3), ("evaluate", 5.0), ("export", 7.0), ("end", 1.0),
]  # fmt: skip


def test_instants_are_of_each_kind_in_turn_and_within_their_phase():
    found = list(kills.drawn(PHASES, 400, 0))
    assert found == list(kills.drawn(PHASES, 400, 0)) != list(kills.drawn(PHASES, 400, 1))
    assert [kills.kind_of(instant.phase) for instant in found] == list(kills.KINDS) * 100
    for instant in found:
        lengths = [seconds for name, seconds in PHASES if name == instant.phase]
        assert 0 <= instant.seconds <= lengths[instant.nth]
    assert {(i.phase, i.nth) for i in found} >= {("align", 0), ("align", 1), ("save of align", 1), ("evaluate", 0)}


def test_a_folder_shows_what_its_run_is_doing(tmp_path):
    run, seen = tmp_path / "run", []
    for name in (
        "ledger.json", "steps/0-linear/student.writing",
        "steps/0-linear/DONE", "steps/1-align/checkpoint-1",
        "steps/1-align/checkpoint.writing", "steps/1-align/DONE", "steps/2-distill/DONE", "model.writing",
        "report.html",
    ):  # fmt: skip
        seen.append(kills.phase(run))
        (run / name).mkdir(parents=True)
    wanted = "start", "linear", "save of linear", "align", "align", "save of align", "distill", "evaluate", "export"
    assert (*seen, kills.phase(run)) == (*wanted, "end")


@pytest.fixture
def two(tmp_path):
    """Folders of a finished run and of another that says the same at another time."""
    for name, seconds in (("one", 1.0), ("other", 2.0)):
        run = tmp_path / name
        for place in ("model", "steps/2-distill/student"):
            (run / place).mkdir(parents=True)
            save_file({"w": torch.arange(1.0, 5.0)}, run / place / "model.safetensors")
        (run / "ledger.json").write_text("{}")
        (run / "steps" / "2-distill" / "DONE").write_text(json.dumps({"seconds": seconds, "loss_last": 0.5}))
        (run / "report.json").write_text(json.dumps({"seconds": {"total": seconds}, "kl": {"mean_nats": 0.25}}))
        rows = [{"stage": "distill", "step": i, "train/loss": 1.0, "train/seconds": i * seconds} for i in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "one", tmp_path / "other"


def test_runs_that_differ_by_a_clock_alone_are_equal(two):
    assert not kills.differences(*two) and not kills.beyond_rounding(*two)


@pytest.mark.parametrize(
    "file, old, new, is_rounding",
    [
        ("report.json", "0.25", "0.2500001", True),
        ("metrics.jsonl", '"train/loss": 1.0', '"train/loss": 1.000001', True),
        ("metrics.jsonl", '"train/loss": 1.0', '"train/loss": 1.01', False),
        ("metrics.jsonl", '"step": 3', '"step": 2', False),
        ("ledger.json", "{}", "{ }", True),
    ],
)
def test_what_was_changed_shows(two, file, old, new, is_rounding):
    one, other = two
    text = (other / file).read_text()
    assert old in text
    (other / file).write_text(text.replace(old, new))
    assert kills.differences(one, other) == [f"{file} differs"]
    assert bool(kills.beyond_rounding(one, other)) != is_rounding


@pytest.mark.parametrize("factor, is_rounding", [(1 + 1e-6, True), (1.001, False)])
def test_weights_that_are_off_show(two, factor, is_rounding):
    one, other = two
    for place in ("model", "steps/2-distill/student"):
        file = other / place / "model.safetensors"
        save_file({name: value * factor for name, value in load_file(file).items()}, file)
    assert len(kills.differences(one, other)) == 2
    assert bool(kills.beyond_rounding(one, other)) != is_rounding


def test_a_file_that_is_missing_shows(two):
    one, other = two
    shutil.rmtree(other / "model")
    assert kills.differences(one, other) == ["model/model.safetensors is in one of them alone"]


def test_lines_stay_up_to_the_last_checkpoint(two):
    run, _ = two
    step, log = run / "steps" / "2-distill", run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert kills.lines_that_stay(run) == b"".join(lines)
    (step / "DONE").unlink()
    assert kills.lines_that_stay(run) == b""
    (step / "checkpoint-2").mkdir()
    assert kills.lines_that_stay(run) == b"".join(lines[:2])
    log.write_bytes(b"".join(lines)[:-9])  # as a kill in the middle of a line leaves it
    (step / "checkpoint-3").mkdir()
    assert kills.lines_that_stay(run) == b"".join(lines[:2])
