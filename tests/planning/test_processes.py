"""Plans under torchrun: what a process holds, whether the teacher is shared out, and what is refused."""

import functools

import pytest

from convert import recipes
from convert.core import processes
from convert.core.errors import UserError
from convert.domains.language import Language
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.planning import plan as planning
from convert.planning.plan import make_plan as make_plan_in

LANGUAGE = Language()
make_plan = functools.partial(make_plan_in, LANGUAGE)


@pytest.fixture
def of_two_processes(monkeypatch):
    """Plans of a process of two, which has so many bytes."""
    monkeypatch.setattr(processes, "_joined", processes._Joined(0, 2, None))

    def planned(room, share="auto"):
        monkeypatch.setattr(planning, "memory_of_process", lambda _: room)
        config = read_config(resolve("pythia-1b"))
        recipe = recipes.TARGETS["mamba"].recipe(recipes.budget("pythia-1b", config, None))
        return make_plan("pythia-1b", config, recipe, "stdlib", "cpu", share_teacher=share)

    return planned


def test_several_processes_share_a_teacher_out_where_it_does_not_fit_each(of_two_processes):
    peaks = {share: max(s.peak_bytes for s in of_two_processes(10**15, share).steps) for share in ("never", "always")}
    assert not of_two_processes(peaks["never"]).shares_teacher
    between = of_two_processes(peaks["never"] - 1)
    assert between.shares_teacher and not between.refusals
    assert max(step.peak_bytes for step in between.steps) == peaks["always"] < peaks["never"]
    assert any("each holds its part of the teacher and" in line for line in between.assumptions)
    assert any("each holds the teacher whole and" in line for line in of_two_processes(10**15).assumptions)


def test_a_plan_that_does_not_fit_its_processes_is_refused(of_two_processes):
    peak = max(step.peak_bytes for step in of_two_processes(10**15, "always").steps)
    (reason,) = of_two_processes(peak - 1).refusals
    assert reason.startswith("Each of 2 processes needs about")
    assert "Start fewer processes, or take more computers" in reason
    (reason,) = of_two_processes(peak, "never").refusals
    assert "Let them share the teacher out (--share-teacher always)" in reason
    assert not of_two_processes(peak).refusals


def test_one_process_plans_as_if_nothing_could_be_shared(of_two_processes, monkeypatch):
    monkeypatch.setattr(processes, "_joined", None)
    plan = of_two_processes(1)
    assert not plan.shares_teacher and not plan.refusals
    assert max(s.peak_bytes for s in plan.steps) > 4 * (plan.parameters_teacher + 4 * plan.parameters_student)


def test_several_processes_refuse_a_gguf_file(monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(processes, "_joined", processes._Joined(0, 2, None))
    with pytest.raises(
        UserError, match="Several processes read rows of safetensors files, and .*gguf would be unpacked"
    ):
        LANGUAGE.read_config(resolve(str(file)))


@pytest.mark.parametrize(
    "share, room, found",
    [("auto", 10**10, False), ("auto", 4_500_000_000, True), ("always", 10**10, True), ("never", 4_500_000_000, False)],
)
def test_a_teacher_that_is_only_asked_is_shared_out_where_it_does_not_fit(share, room, found, monkeypatch):
    """1.01 billion float32 parameters; with a part of them, embeddings, head and two layers a process has 3.25 GB."""
    config = read_config(resolve("pythia-1b"))
    monkeypatch.setattr(planning, "memory_of_process", lambda _: room)
    assert not planning.shares_to_ask(LANGUAGE, config, "cpu", share)
    monkeypatch.setattr(processes, "_joined", processes._Joined(0, 2, None))
    assert planning.shares_to_ask(LANGUAGE, config, "cpu", share) is found


@pytest.mark.parametrize(
    "share, words",
    [
        ("auto", "hold 3.25 GB of the teacher, and has 1 GB. Start fewer processes, or take more computers."),
        ("never", "hold 4.05 GB of the teacher, and has 1 GB. Let them share the teacher out"),
    ],
)
def test_a_teacher_that_does_not_fit_is_not_asked(share, words, monkeypatch):
    config = read_config(resolve("pythia-1b"))
    monkeypatch.setattr(processes, "_joined", processes._Joined(0, 2, None))
    monkeypatch.setattr(planning, "memory_of_process", lambda _: 10**9)
    with pytest.raises(UserError, match=f"Each of 2 processes would {words}"):
        planning.shares_to_ask(LANGUAGE, config, "cpu", share)
