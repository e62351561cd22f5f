"""The stage align with terms that compare whole decoder layers, teacher-forced."""

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor, nn

from convert.data.batches import Batch
from convert.models.access import layers_of
from convert.models.positions import documents_of
from convert.models.slot import Call, attention_of
from convert.models.swap import swap
from convert.objectives import BlockTerm, Objective
from convert.objectives.features import energy_mse
from convert.training import loop
from convert.training.align import align
from tests.conftest import FAMILIES, assert_close, options_of, perturb, tiny_teacher
from tests.training.stages import SETTINGS, Logged, batches

ONE = dataclasses.replace(SETTINGS, tokens=128, clip=1e9)
BLOCKS = Objective.of("block_energy_mse")
KINDS = [*((family, {}) for family in FAMILIES), ("gpt_neox", {"use_parallel_residual": False})]
every_kind = pytest.mark.parametrize("family, changes", KINDS, ids=[*FAMILIES, "gpt_neox_sequential"])


@every_kind
def test_the_loss_is_zero_where_the_mixer_is_the_attention(family, changes):
    """A window that is long enough, in packed documents; it is not where one part of one layer differs."""
    losses = []
    for part in (None, "mixer", "mlp", "post_attention_layernorm"):
        student = swap(tiny_teacher(family, **changes), "gate-swa", options_of("gate-swa", window=32))
        block = layers_of(student)[1]
        if part is not None:
            perturb(attention_of(block).mixer if part == "mixer" else getattr(block, part))
        log = Logged()
        align(
            student, tiny_teacher(family, **changes), batches(), dataclasses.replace(ONE, objective=BLOCKS), track=log
        )
        losses += log.losses
    assert losses[0] < 1e-10 and min(losses[1:]) > 1e-5
    assert documents_of(batches()(0).position_ids) is not None


def by_hand(block: nn.Module, x: Tensor, cos_sin: tuple, call: Call) -> Tensor:
    """What a decoder layer does, spelled out."""
    attended = attention_of(block)(block.input_layernorm(x), position_embeddings=cos_sin, call=call)[0]
    if getattr(block, "use_parallel_residual", False):
        return x + attended + block.mlp(block.post_attention_layernorm(x))
    x = x + attended
    return x + block.mlp(block.post_attention_layernorm(x))


@pytest.mark.parametrize("checkpointing", [False, True])
@every_kind
def test_gradients_are_those_of_the_plain_computation(family, changes, checkpointing, monkeypatch):
    """In float64, of all parameters of the one layer that has a mixer; no other layer has any. The stage takes losses
    in float32."""
    teacher = tiny_teacher(family, **changes).double().requires_grad_(False)
    student = swap(tiny_teacher(family, **changes), "linear", layers=(1,)).double()
    perturb(attention_of(layers_of(student)[1]).mixer)
    batch: Batch = batches()(0)
    known = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    states = teacher(**known, output_hidden_states=True, use_cache=False).hidden_states
    cos_sin = teacher.base_model.rotary_emb(states[1], batch.position_ids)
    block = layers_of(student)[1]
    y = by_hand(block, states[1], cos_sin, Call(document_ids=documents_of(batch.position_ids)))
    loss = energy_mse(y - states[1], states[2] - states[1])
    expected = torch.autograd.grad(loss, list(block.parameters()))

    found: dict[str, Tensor] = {}

    def norms(student: nn.Module) -> dict:
        found.update({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        return {}

    monkeypatch.setattr(loop, "_norms", norms)
    settings = dataclasses.replace(ONE, objective=BLOCKS, trains="everything", checkpointing=checkpointing)
    align(student, teacher, batches(), settings)
    names = {id(p): n for n, p in student.named_parameters()}
    assert found.keys() == {names[id(p)] for p in block.parameters()}
    floor = 1e-3 * max(float(g.square().mean().sqrt()) for g in expected)
    for p, gradient in zip(block.parameters(), expected, strict=True):
        assert_close(found[names[id(p)]], gradient, 1e-6, floor=floor)


def test_only_what_is_trained_in_layers_with_mixers_moves():
    student = swap(tiny_teacher("qwen3"), "kda", layers=(0, 2))
    before = {n: p.clone() for n, p in student.named_parameters()}
    align(student, tiny_teacher("qwen3"), batches(), dataclasses.replace(ONE, objective=BLOCKS, trains="mixers + mlps"))
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(".1." not in n and (".mixer." in n or ".mlp." in n) for n in moved)
    assert {layer for layer in "02" if any(f".{layer}.mlp." in n for n in moved)} == {"0", "2"}


@pytest.mark.parametrize("also", ["", " + energy_mse"])
def test_the_graph_of_a_layer_is_freed_before_the_next(also):
    """As many tensors are kept for backward passes in the last layer as in the first."""
    alive: weakref.WeakSet = weakref.WeakSet()
    counts = []

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    class Counts(BlockTerm):
        def loss(self, student: Tensor, teacher: Tensor, inputs: Tensor, owned: nn.Module | None) -> Tensor:
            counts.append(len(alive))
            return energy_mse(student, teacher)

    objective = Objective(((1.0, Counts()), *(Objective.of(also[3:]).terms if also else ())))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        student = swap(tiny_teacher("llama"), "linear")
        align(student, tiny_teacher("llama"), batches(), dataclasses.replace(ONE, objective=objective))
    assert len(counts) == 3 and counts[0] > 10 and len(set(counts)) == 1


def test_blocks_and_attention_add_up():
    losses = {}
    for text in ("block_energy_mse", "energy_mse", "2*block_energy_mse + 0.5*energy_mse"):
        log, student = Logged(), swap(tiny_teacher("llama"), "linear")
        align(
            student, tiny_teacher("llama"), batches(), dataclasses.replace(ONE, objective=Objective.of(text)), track=log
        )
        losses[text] = log.losses[0]
    first, second, both = losses.values()
    assert both == pytest.approx(2 * first + 0.5 * second, rel=1e-6) and min(first, second) > 0
