"""Layers, slots, hidden states and layer outputs of teachers, students and plain models."""

import pytest
import torch

from convert.data.batches import Batch
from convert.models.access import hidden_states, layer_outputs, layers_of, slots_of
from convert.models.swap import swap
from tests.conftest import FAMILIES, tiny_teacher, token_ids

IDS = token_ids(2, 12)
BATCH = Batch(IDS, IDS, torch.arange(12).expand(2, -1))


@pytest.mark.parametrize("mixer", [None, "mamba2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_and_its_student(family, mixer):
    model = tiny_teacher(family) if mixer is None else swap(tiny_teacher(family), mixer, layers=(0, 2))
    with torch.no_grad(), layer_outputs(model) as outputs:
        hidden = hidden_states(model, BATCH)
        logits = model(input_ids=IDS, position_ids=BATCH.position_ids, use_cache=False).logits
    assert len(layers_of(model)) == 3 and list(slots_of(model)) == ([] if mixer is None else [0, 2])
    assert torch.equal(model.get_output_embeddings()(hidden), logits)
    assert len(outputs) == 6 and all(output.shape == hidden.shape for output in outputs)  # of both passes
    norm = model.base_model.base_model if mixer else model.base_model
    norm = norm.final_layer_norm if family == "gpt_neox" else norm.norm
    assert torch.equal(norm(outputs[2]), hidden)


def test_outputs_are_seen_inside_the_block_alone():
    model = tiny_teacher("llama")
    with layer_outputs(model) as outputs:
        pass
    with layer_outputs(model, wanted=False) as nothing:
        hidden_states(model, BATCH)
    hidden_states(model, BATCH)
    assert outputs == [] and nothing == []
