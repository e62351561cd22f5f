"""Whole runs of several processes: the command and its report are those of one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convert import pipeline
from convert.core import processes
from convert.run import main
from tests.e2e.conftest import command, quiet, teacher, text, weights  # noqa: F401  # fixtures
from tests.parallel.fork import commands

# distill measures by generation while the student is shared out
MEASURED = ("--set", "distill.evaluate_every=128", "--set", "distill.precision=float32", "--set",
            "align.precision=float32")  # fmt: skip
OF_THE_CLOCK = re.compile(
    r"seconds|_per_s$|time_to_first|versions|commit|\.model$|models\.|max_abs|headline_change|export"
)


def numbers(found, path=""):
    """Path -> value of everything in a report but what a clock or rounding alone decides."""
    if isinstance(found, (dict, list)):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from numbers(value, f"{path}.{key}")
    elif not OF_THE_CLOCK.search(path):
        yield path, found


def report(run: Path) -> dict:
    return dict(numbers(json.loads((run / "report.json").read_text())))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def straight(quiet, place, teacher, text):  # noqa: F811
    """A run of two processes that nothing stopped, which share the teacher out; what they said is beside it."""
    if not (place / "run").exists():
        shared = command(teacher, text, place / "run", *MEASURED, "--share-teacher", "always", to="linear")
        assert commands(place / "said", 2, shared) == [0, 0]
    return place / "run"


def test_two_processes_report_what_one_does(straight, teacher, text, tmp_path):  # noqa: F811
    assert main(command(teacher, text, tmp_path / "of-1", *MEASURED, to="linear")) == 0
    one, two = report(tmp_path / "of-1"), report(straight)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value), key
    logged = [rows(tmp_path / "of-1"), rows(straight)]
    assert [row["step"] for row in logged[0]] == [row["step"] for row in logged[1]]
    for row, other in zip(*logged, strict=True):
        for key in ("train/loss", "train/grad_norm", "held_out/perplexity", "held_out/generation"):
            assert other.get(key, -1) == pytest.approx(row.get(key, -1), rel=1e-5), key
    assert any("held_out/generation" in row for row in logged[0])
    assert "it/s" not in (straight.parent / "said" / "said-1").read_text()


def dies_before_its_last_step() -> None:
    done = pipeline._done

    def die(step, *others):
        if step.name == "distill" and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done(step, *others)

    pipeline._done = die


def test_killed_and_repeated_is_bit_identical(straight, teacher, text, tmp_path):  # noqa: F811
    """With a teacher that each process has whole, too."""
    killed = command(teacher, text, tmp_path / "killed", *MEASURED, to="linear")
    assert commands(tmp_path / "second", 2, killed, dies_before_its_last_step) == [2, -signal.SIGKILL]
    said = (tmp_path / "second" / "said-0").read_text()
    assert "error: The processes of a run go on together, and another one ended" in said and "defect" not in said
    assert commands(tmp_path / "third", 2, killed) == [0, 0]
    one, other = weights(straight), weights(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    files = [
        {f.name: f.read_bytes() for f in (run / "model").glob("*.json")} for run in (straight, tmp_path / "killed")
    ]
    assert files[0] == files[1]


def test_a_batch_too_small_for_all_is_said_once(teacher, text, tmp_path):  # noqa: F811
    assert commands(tmp_path / "three", 3, command(teacher, text, tmp_path / "run")) == [2, 2, 2]
    said = [(tmp_path / "three" / f"said-{rank}").read_text() for rank in range(3)]
    assert "error: Step align: each process takes a part of every batch; a batch has 2 sequences, and" in said[0]
    assert "error" not in said[1] + said[2] and not (tmp_path / "run").exists()


def test_torchrun_says_a_mistake_once(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "convert.run"]
    options = ["neox-nano", "--to", "mamba", "--tiny", "--device", "cpu:1", "--out", str(tmp_path / "run")]
    found = subprocess.run([*run, *options], capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode != 0 and found.stderr.count("error: Under torchrun each process takes a device") == 1
