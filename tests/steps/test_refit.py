"""Refitted output projections solve what they say they solve."""

import copy

import pytest
import torch

from convert.data.batches import Batch
from convert.mixers.base import Context
from convert.models.access import hidden_states, layers_of
from convert.models.positions import documents_of
from convert.models.slot import attention_of
from convert.models.swap import swap
from convert.steps.refit import RIDGE, refit_outputs
from tests.conftest import FAMILIES, assert_close, tiny_teacher, token_ids

LAYERS = (0, 2)


def batches(count: int = 8, length: int = 64):
    positions = torch.cat([torch.arange(40), torch.arange(length - 40)]).expand(2, -1)  # two documents
    return [Batch(ids, ids, positions) for ids in (token_ids(2, length, seed=i) for i in range(count))]


@torch.no_grad()
def seen_by(teacher, student, layer):
    """What enters the output projection, and what the teacher's attention gives, over all batches: [N, C], [N, D]."""
    mixer, entering, wanted = student.slots()[layer].mixer, [], []

    def see(module, args, kwargs, output):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mixer(x, Context(*kwargs["position_embeddings"], None, documents))
        wanted.append(output[0].flatten(0, 1))

    hooks = [
        attention_of(layers_of(teacher)[layer]).register_forward_hook(see, with_kwargs=True),
        mixer.out.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(0, 1))),
    ]
    for batch in batches():
        documents = documents_of(batch.position_ids)
        hidden_states(teacher, batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(entering).double(), torch.cat(wanted).double()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_projection_is_that_of_ridge_regression(family):
    teacher = tiny_teacher(family)
    student = swap(copy.deepcopy(teacher), "kda", layers=LAYERS)
    before = {name: p.clone() for name, p in student.named_parameters()}
    errors = {}
    for moment in ("before", "after"):
        for layer in LAYERS:
            h, y = seen_by(teacher, student, layer)
            out = student.slots()[layer].mixer.out
            y = y if out.bias is None else y - out.bias
            rest = y - h @ out.weight.T.double()
            errors[moment, layer] = (rest.square().sum() / y.square().sum()).item()
            if moment == "after":  # the gradient of the squares and of the ridge is 0
                ridge = RIDGE * (h.square().sum() / h.shape[1])
                assert_close(h.T @ rest, ridge * out.weight.T.double(), 1e-2)
        refit_outputs(student, teacher, batches(), LAYERS)
    assert all(errors["after", layer] < 0.95 * errors["before", layer] for layer in LAYERS), errors
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert len(changed) == len(LAYERS) and all(name.endswith("mixer.out.weight") for name in changed)
