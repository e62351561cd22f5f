"""A stage that was stopped or killed goes on with as many processes as before, bit for bit, or with others, as well as
rounding allows."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.core import processes
from convert.core.errors import Interrupted, UserError
from convert.models.saving import weights_of
from convert.objectives import Objective
from convert.runs import checkpoint
from convert.runs.checkpoint import StepFolder, StopRequest
from convert.training import parallel
from convert.training.distill import distill
from tests.conftest import tiny_teacher
from tests.parallel.fork import finished, start, together
from tests.training.stages import SETTINGS, Logged, batches, student_of

STEPS = 5


class Watched(Logged):
    """Asks to stop, in the last process alone, after some steps; or ends that process while it saves the next step."""

    def __init__(self, stop: StopRequest, stop_after: int | None, die_after: int | None):
        super().__init__()
        self.stop, self.stop_after, self.die_after = stop, stop_after, die_after

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        super().log(step, tokens, numbers)
        if processes.rank() == processes.world() - 1:
            self.stop.requested = step == self.stop_after
            if step == self.die_after:
                checkpoint.save_parts = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def trained(run: Path, stop_after: int | None = None, die_after: int | None = None) -> tuple[dict, list, list]:
    """The weights after the stage, and the losses and norms of the steps of this call; a checkpoint after each step."""
    settings = dataclasses.replace(
        SETTINGS, tokens=STEPS * 160, batch_tokens=160, micro_tokens=64, lr=1e-4, save_every=0.0, trains="everything",
        objective=Objective.of("taid + 0.5*hidden_projection"),
    )  # fmt: skip
    stop = StopRequest()
    track = Watched(stop, stop_after, die_after)
    student = student_of("qwen3", "mamba2")
    torch.manual_seed(0)
    try:
        student = parallel.in_parts(
            distill, student, tiny_teacher("qwen3"), batches(settings), settings, track=track,
            keep=StepFolder(run, 1, "distill", stop),
        )  # fmt: skip
    except Interrupted:
        return {}, track.losses, track.norms
    return dict(weights_of(student)), track.losses, track.norms


def both(*runs: tuple[Any, ...]) -> list[Any]:
    return [trained(*run) for run in runs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run of two processes: one that nothing stopped, one stopped after step 2, one where the second
    process was killed in the save after step 3; and one of a single process, stopped after step 2."""
    at = tmp_path_factory.mktemp("resume")
    straight, *_ = together(at / "first", 2, both, (at / "straight",), (at / "stopped", 2))
    codes = finished(start(at / "second", 2, trained, at / "killed", None, 3))
    trained(at / "single", 2)
    for name in ("stopped", "single"):
        for copy in (1, 2, 3):
            shutil.copytree(at / name, at / f"{name}-{copy}")
    return at, straight[0], codes


def test_the_same_number_of_processes_ends_bit_for_bit(runs):
    at, (weights, losses, norms), _ = runs
    kept = sorted(p.name for p in (at / "killed" / "steps" / "1-distill").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-2"]
    resumed = together(at / "third", 2, both, (at / "stopped-2",), (at / "killed",), (at / "single-2",))
    for found in resumed:
        for again, first in ((found[0], 2), (found[1], 2)):
            assert again[1:] == (losses[first:], norms[first:])
            assert again[0].keys() == weights.keys()
            assert all(torch.equal(again[0][name], weights[name]) for name in weights)
        check(found[2], losses, norms)  # which one process began
    assert (at / "killed" / "steps" / "1-distill" / "checkpoint-4").exists()


def test_each_process_keeps_its_part(runs):
    """Of values and moments alike: the student is shared out evenly."""
    at, *_ = runs
    files = sorted((at / "stopped" / "steps" / "1-distill" / "checkpoint-2").glob("*.distcp"))
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)


def check(found: tuple[dict, list, list], losses: list, norms: list) -> None:
    assert len(found[1]) == STEPS - 2
    assert found[1] == pytest.approx(losses[2:], abs=1e-6)
    assert found[2] == pytest.approx(norms[2:], rel=1e-5)


def test_another_number_of_processes_goes_on_to_rounding(runs):
    at, (_, losses, norms), _ = runs
    check(trained(at / "stopped-1"), losses, norms)
    for found in together(at / "fourth", 3, trained, at / "stopped-3"):
        check(found, losses, norms)


def test_a_process_that_is_killed_ends_the_others_in_words(runs):
    at, _, codes = runs
    assert codes == [1, -signal.SIGKILL]
    said = (at / "second" / "raised-0").read_text()
    assert said.startswith("UserError: The processes of a run go on together, and another one ended")


def test_a_part_that_is_missing_is_refused_by_all(runs):
    """Of a folder that is not shared, the first process sees its own files alone."""
    at, *_ = runs
    codes = finished(start(at / "fifth", 2, _without_the_parts_of_others, at / "unshared"))
    assert codes == [1, 1]
    for rank in (0, 1):
        said = (at / "fifth" / f"raised-{rank}").read_text()
        assert said.startswith("UserError: The run's folder must be one that all processes share"), said


def _without_the_parts_of_others(run: Path) -> None:
    save = checkpoint.save_parts

    def elsewhere(folder: Path, state: dict) -> None:
        save(folder, state)
        if processes.rank() == 1:
            (folder / "__1_0.distcp").unlink()
        processes.gathered(None)  # no process looks before the file is gone

    checkpoint.save_parts = elsewhere
    with pytest.raises(UserError) as refused:
        trained(run)
    raise refused.value
