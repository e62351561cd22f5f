"""Image classifiers are whole in each process, and trained as by one."""

import dataclasses

import pytest
import torch

from convert.core.processes import world
from convert.objectives import Objective
from convert.training.images import classify
from tests.conftest import assert_close
from tests.evaluation.classifiers import classifier
from tests.parallel.fork import together
from tests.training.stages import Logged
from tests.training.test_images import SETTINGS, batch_of

# micro-batches of 4 images in one process and in several: batch norms see as many
SGD = dataclasses.replace(
    SETTINGS, images=3 * 16, micro_images=4, optimizer="sgd", lr=1e-3, ema=0.9, clip=0.5,
    objective=Objective.of("cross_entropy + 0.5*one_for_all"),
)  # fmt: skip


def trained() -> tuple[dict, list[float], list[float], int]:
    track = Logged()
    student = classify(classifier("resnet", seed=1), classifier("vit"), batch_of, SGD, track=track)
    return dict(student.state_dict()), track.losses, track.norms, world()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_train_a_classifier_as_one(size, tmp_path):
    """Weights, their moving average, and the running statistics of batch norms, which depend on the order of
    micro-batches."""
    weights, losses, norms, _ = trained()
    for found in together(tmp_path / "run", size, trained):
        assert found[3] == size
        assert found[1] == pytest.approx(losses, abs=1e-6)
        assert found[2] == pytest.approx(norms, rel=1e-5)
        for name, value in weights.items():
            assert_close(found[0][name].double(), value.double(), 1e-5)
    start = classifier("resnet", seed=1).state_dict()
    assert not any(torch.equal(weights[n], v) for n, v in start.items() if n.endswith("running_mean"))
