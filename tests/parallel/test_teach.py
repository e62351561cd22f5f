"""A recording by several processes is the recording of one."""

import os
import signal

import pytest

from convert import steps, teach
from convert.core import processes
from convert.data import recorded
from convert.models.sharding import is_shared_out
from convert.run import main
from tests.e2e.conftest import command, quiet, teacher, text  # noqa: F401  # fixtures
from tests.e2e.test_teach import EXACT, files, from_, logged, recording, small_parts  # noqa: F401
from tests.parallel.fork import commands


def dies_before_its_part() -> None:
    write = recorded.Recording.write

    def die(self, number, batches):
        if processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, number, batches)

    recorded.Recording.write = die


def asks_a_shared_teacher() -> None:
    records_of = steps.recorded.records_of

    def watched(model, *others):
        assert is_shared_out(model)
        return records_of(model, *others)

    steps.recorded.records_of = watched


def test_two_processes_record_what_one_does_and_go_on_where_one_was_killed(teacher, text, tmp_path):  # noqa: F811
    one, two = tmp_path / "said-1", tmp_path / "said-2"
    assert teach.main(recording(teacher, text, one, "--sample", "4")) == 0
    arguments = recording(teacher, text, two, "--sample", "4")
    codes = commands(tmp_path / "killed", 2, arguments, dies_before_its_part, main=teach.main)
    assert codes == [2, -signal.SIGKILL] and not (two / "DONE").exists()
    assert "another one ended" in (tmp_path / "killed" / "said-0").read_text()
    assert commands(tmp_path / "again", 2, arguments, main=teach.main) == [0, 0]
    assert files(one) == files(two)


def test_processes_that_share_the_teacher_out_record_the_same(teacher, text, tmp_path):  # noqa: F811
    """Three parts of one batch each are two for the first process and one for the second, which then takes part in the
    passes of the first."""
    one, two = tmp_path / "said-1", tmp_path / "said-2"
    how = ("--sample", "4", "--set", "distill.micro_tokens=64")
    assert teach.main(recording(teacher, text, one, *how)) == 0
    arguments = recording(teacher, text, two, *how, "--share-teacher", "always")
    assert commands(tmp_path / "shared", 2, arguments, asks_a_shared_teacher, main=teach.main) == [0, 0]
    assert files(one) == files(two)


def test_two_processes_learn_from_a_recording_as_one_does(teacher, text, tmp_path):  # noqa: F811
    said = tmp_path / "said"
    assert teach.main(recording(teacher, text, said, *EXACT)) == 0
    arguments = [command(teacher, text, tmp_path / f"of-{n}", *EXACT, *from_(said), to="linear") for n in (1, 2)]
    assert main(arguments[0]) == 0
    assert commands(tmp_path / "two", 2, arguments[1]) == [0, 0]
    assert logged(tmp_path / "of-2") == pytest.approx(logged(tmp_path / "of-1"), rel=1e-5)
