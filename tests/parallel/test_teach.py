"""A recording by several processes is the recording of one."""

import dataclasses
import functools
import os
import signal

import numpy as np
import pytest
from transformers import PreTrainedModel

from convert import steps, teach
from convert.core import processes
from convert.core.processes import rank
from convert.data import recorded
from convert.data.batches import Batches
from convert.models.sharding import copied, is_shared_out
from convert.run import main
from convert.training.recording import records_of
from tests.conftest import VOCAB, tiny_teacher
from tests.e2e.conftest import command, quiet, teacher, text  # noqa: F401  # fixtures
from tests.e2e.test_teach import EXACT, files, from_, logged, recording, small_parts  # noqa: F401
from tests.parallel.fork import commands, together
from tests.training.stages import SETTINGS, tokens


def dies_before_its_part() -> None:
    write = recorded.Recording.write

    def die(self, number, batches):
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, number, batches)

    recorded.Recording.write = die


def asks(is_shared: bool) -> None:
    """Let a process fail whose teacher is not shared out as it should be."""
    of_whole = steps.recorded.records_of

    def watched(model, *others):
        assert is_shared_out(model) == is_shared
        return of_whole(model, *others)

    steps.recorded.records_of = watched


@pytest.mark.parametrize("share", ["never", "always"])
def test_two_processes_record_what_one_does_and_go_on_where_one_was_killed(share, teacher, text, tmp_path):  # noqa: F811
    """Three parts are two for the first process and one for the second, which takes part in all passes of the first
    where they share the teacher out."""
    one, two = tmp_path / "said-1", tmp_path / "said-2"
    assert teach.main(recording(teacher, text, one, "--sample", "4")) == 0
    arguments = recording(teacher, text, two, "--sample", "4", "--share-teacher", share)
    codes = commands(tmp_path / "killed", 2, arguments, dies_before_its_part, main=teach.main)
    assert codes == [2, -signal.SIGKILL] and not (two / "DONE").exists()
    assert "another one ended" in (tmp_path / "killed" / "said-0").read_text()
    before = functools.partial(asks, share == "always")
    assert commands(tmp_path / "again", 2, arguments, before, main=teach.main) == [0, 0]
    assert files(one) == files(two)


def test_batches_of_one_and_three_passes_are_recorded_together(tmp_path):
    """Rows of conversations differ in length, and with it the passes of a batch."""
    wanted = [_recorded(tiny_teacher("llama"), rows) for rows in (3, 1)]
    found = together(tmp_path / "two", 2, _recorded_by_two)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def _recorded(model: PreTrainedModel, rows: int) -> np.ndarray:
    settings = dataclasses.replace(SETTINGS, micro_tokens=32, seq_len=32)
    batch = Batches(tokens(), 32, rows, 3)(0)
    assert len(list(batch.parts(settings.micro_units))) == rows
    return records_of(model, batch, 0, settings, {"vocab_size": VOCAB, "top_k": 5, "sample": 0})


def _recorded_by_two() -> np.ndarray:
    return _recorded(copied(tiny_teacher("llama")), 3 if rank() == 0 else 1)


def test_two_processes_learn_from_a_recording_as_one_does(teacher, text, tmp_path):  # noqa: F811
    said = tmp_path / "said"
    assert teach.main(recording(teacher, text, said, *EXACT)) == 0
    arguments = [command(teacher, text, tmp_path / f"of-{n}", *EXACT, *from_(said), to="linear") for n in (1, 2)]
    assert main(arguments[0]) == 0
    assert commands(tmp_path / "two", 2, arguments[1]) == [0, 0]
    assert logged(tmp_path / "of-2") == pytest.approx(logged(tmp_path / "of-1"), rel=1e-5)
