"""Two and three processes train as one does, and a fault in how they share a batch shows."""

import pytest
import torch

from tests.conftest import assert_close, rms
from tests.parallel import stages
from tests.parallel.fork import together


@pytest.fixture(scope="module")
def one():
    return stages.all_found()


@pytest.fixture(scope="module", params=[2, 3])
def several(request, tmp_path_factory):
    return together(tmp_path_factory.mktemp("several") / "run", request.param, stages.all_found)


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


@pytest.mark.parametrize("name", stages.CASES)
def test_several_processes_train_as_one(name, one, several):
    for found in several:  # each process
        check(found[name], one[name])
        assert torch.tensor(found[name].losses).equal(torch.tensor(several[0][name].losses))
