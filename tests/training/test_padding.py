"""Padding reaches no state and no loss, whatever stands there."""

import copy

import pytest
import torch

from convert.data.batches import Batch
from convert.models.access import slots_of
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training import STAGES
from convert.training.settings import Settings
from tests.conftest import options_of, perturb, tiny_teacher, token_ids

LENGTHS = (24, 15)


def padded(fill: int) -> Batch:
    """Two rows of two documents; the second is padded from 15 on."""
    ids, positions = token_ids(2, 24), torch.arange(24).repeat(2, 1)
    positions[0, 10:] -= 10
    positions[1, 6:] -= 6
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, 9] = labels[1, 5] = -100
    ids[1, 15:], labels[1, 14:], positions[1, 15:] = fill, -100, torch.arange(9)
    return Batch(ids, labels, positions, torch.tensor(LENGTHS))


@pytest.mark.parametrize(
    "stage, objective",
    [
        ("align", "energy_mse"),
        ("align", "cosine_distance"),
        ("align", "block_energy_mse"),
        ("align", "block_l2_distance"),
        ("distill", "forward_kl + 0.5*feature_matching"),
    ],
)
@pytest.mark.parametrize("mixer", ["kda", "gate-swa"])
def test_padding_changes_no_weight(stage, objective, mixer):
    """A step on a batch with padding, by what is in the padding, in micro-batches of any size."""
    teacher = tiny_teacher("llama")
    start = swap(tiny_teacher("llama"), mixer, options_of(mixer))
    for slot in slots_of(start).values():
        perturb(slot.mixer)  # or a mixer that starts as the attention has nothing to learn
    found = []
    for fill, micro in ((5, 64), (77, 64), (5, 24)):
        settings = Settings(
            tokens=48, lr=1e-2, objective=Objective.of(objective), trains="mixers", seq_len=24, batch_tokens=48,
            micro_tokens=micro, precision="float32",
        )  # fmt: skip
        student = STAGES[stage](copy.deepcopy(start), teacher, lambda _, fill=fill: padded(fill), settings)
        found.append(torch.cat([p.flatten() for p in student.parameters()]))
    moved = torch.cat([p.flatten() for p in start.parameters()])
    assert not torch.equal(found[0], moved)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-4)
