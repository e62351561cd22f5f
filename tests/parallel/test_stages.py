"""Two and three processes train as one does, and a fault in how they share a batch shows."""

import math

import pytest
import torch

from convert.core import processes
from convert.data.batches import Batches
from convert.training import parallel
from tests.conftest import assert_close, rms
from tests.parallel import stages
from tests.parallel.fork import together

OF_THREE = ("distill gpt_neox linear", "distill tied llama mamba", "align qwen3 mamba2")


@pytest.fixture(scope="module")
def one():
    return stages.all_found(stages.CASES)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two") / "run", 2, stages.all_found_and_looked, stages.CASES)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return together(tmp_path_factory.mktemp("three") / "run", 3, stages.all_found, OF_THREE)


def check(found: stages.Found, one: stages.Found) -> None:
    """Gradients of every parameter to a relative RMS of 1e-5, losses to 1e-6, norms and measurements to 1e-5."""
    assert found.gradients.keys() == one.gradients.keys() and one.gradients
    floor = 1e-2 * max(rms(gradient) for gradient in one.gradients.values())
    for name, gradient in one.gradients.items():
        assert_close(found.gradients[name], gradient, 1e-5, floor=floor)
    assert found.losses == pytest.approx(one.losses, abs=1e-6, rel=1e-6)
    assert found.norms == pytest.approx(one.norms, rel=1e-5)
    assert found.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert found.comparison == pytest.approx(one.comparison, rel=1e-4)


def check_all(name: str, several: list[dict[str, stages.Found]], one: dict[str, stages.Found]) -> None:
    for found in several:  # each process
        check(found[name], one[name])
        assert found[name].losses == several[0][name].losses


@pytest.mark.parametrize("name", stages.CASES)
def test_two_processes_train_as_one(name, one, two):
    check_all(name, [found for found, _ in two], one)


def test_two_processes_look_at_a_model_as_one(two):
    one = stages.looked()
    for _, looked in two:
        assert looked.keys() == one.keys()
        for name, value in one.items():
            assert_close(looked[name], value, 1e-4 if name.startswith("out") else 1e-5)


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_train_as_one(name, one, three):
    check_all(name, three, one)


def test_a_fault_in_how_processes_share_shows(one, tmp_path):
    given = together(tmp_path / "run", 2, stages.all_faults)[0]
    assert given.pop("reshard").startswith("a stage would train gathered copies, which are thrown away: ")
    assert len(given) == 4
    for fault, found in given.items():
        with pytest.raises(AssertionError):
            check(found, one["distill tied qwen3 mla" if "own" in fault else stages.FAULTY])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_every_part_of_a_batch_counts_once(size, monkeypatch):
    """Whatever the numbers are, all processes run equally often, and nothing has to divide."""
    for rows in range(1, 10):
        batch = Batches(stages.SHORT, 32, rows, 3)(0)
        seen, times = [], set()
        for rank in range(size):
            monkeypatch.setattr(processes, "_joined", processes._Joined(rank, size, None))
            own = parallel.shares(batch, 64)
            times.add(len(own))
            seen += [part.input_ids for _, part, whole in own if whole is batch]
            assert all(whole.num_tokens == math.inf for _, _, whole in own if whole is not batch)
        assert len(times) == 1 and sum(map(len, seen)) == rows
        assert torch.equal(torch.cat(seen).unique(dim=0), batch.input_ids.unique(dim=0))
