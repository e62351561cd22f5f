"""The step Select on teachers built so that the right answer is known, with the parts of a run that it asks for."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from convert.core.errors import Interrupted
from convert.models.slot import Slot, attention_of
from convert.models.swap import swap
from convert.steps import selection
from convert.steps.select import Select
from tests.conftest import FAMILIES, options_of, perturb, tiny_teacher, token_ids
from tests.steps.test_selection import batches, only_one_matters
from tests.training.stages import Kept

MIXERS = ("kda", "gate-swa")


def session(teacher, folder=None, score=None):
    """What the step asks a run for: texts, the teacher, where it keeps what it has measured, and the recall."""
    texts = batches()
    return SimpleNamespace(
        teacher=SimpleNamespace(model=teacher),
        sequences=lambda tokens: texts,
        tokens=10_000,
        folder=folder or Kept(),
        domain=SimpleNamespace(recall_loss=lambda model, teacher: score(model)),
    )


def swapped(teacher_of, mixer: str):
    """A student of all of whose layers a mixer took the place, and its teacher."""
    teacher = teacher_of()
    return swap(teacher_of(), mixer, options_of(mixer)).eval(), teacher


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_the_layer_that_matters_gets_its_attention_back(mixer, family, layer):
    """The student is then the teacher in what it computes, by a copy: training it leaves the teacher alone."""
    student, teacher = swapped(lambda: only_one_matters(family, layer), mixer)
    for slot in student.slots().values():
        if slot.layer != layer:  # a perfectly aligned mixer: it says nothing, as the attention did
            nn.init.zeros_(slot.mixer.out.weight)
    ids = token_ids()
    expected = teacher(ids).logits
    assert (student(ids, use_cache=False).logits - expected).abs().max() > 1e-2
    student, result = Select("select", every=3).run(student, session(teacher))
    assert list(student.slots()) == [i for i in range(3) if i != layer]
    assert student.config.mixers[layer] is None and student.config.keeps_attention
    assert (student(ids, use_cache=False).logits - expected).abs().max() < 1e-4
    found = result["layers"]["when_given_back"]
    assert result["layers"]["kept"] == found["order"] == [layer]
    assert min(found["alone"]) == found["alone"][layer] < 1e-6 < found["none"]
    kept = attention_of(student.blocks[layer])
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in kept.parameters()}
    assert not shared and kept.config is student.config.host


@torch.no_grad()
def test_the_ranking_is_what_whole_passes_give():
    student, teacher = swapped(lambda: tiny_teacher("qwen3"), "kda")
    own, parts, texts = selection.parts_of(student), selection.parts_of(teacher), batches()
    found = selection.kl_when_given_back(student, parts, (0, 1, 2), teacher, texts)
    assert all(isinstance(attention_of(block), Slot) and "forward" not in vars(block) for block in student.blocks)
    for i, given in enumerate([{0: parts[0]}, {1: parts[1]}, {2: parts[2]}, {}]):
        selection.restore_layers(student, own)
        selection.restore_layers(student, given)
        pairs = [
            (teacher(b.input_ids).logits.log_softmax(-1), student(b.input_ids, use_cache=False).logits.log_softmax(-1))
            for b in texts
        ]
        kl = torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]).mean().item()
        assert found[i] == pytest.approx(kl, rel=1e-3)


def test_a_teacher_that_was_converted_gives_its_mixers_back():
    teacher = swap(tiny_teacher("llama"), "linear").eval()
    student = swap(swap(tiny_teacher("llama"), "linear"), "mamba2").eval()
    perturb(student.slots()[1].mixer)
    student, _ = Select("select", every=3).run(student, session(teacher))
    assert [spec["name"] for spec in student.config.mixers] == ["mamba2", "linear", "mamba2"]
    ids = token_ids()
    assert (student(ids, use_cache=False).logits - teacher(ids, use_cache=False).logits).abs().max() < 1e-3


@torch.no_grad()
def test_recall_is_ranked_by_the_domains_score():
    """A greedy choice ranks the rest anew with the chosen ones in place: 0 is best alone, and 1 and 2 are best
    together with it."""
    losses = {(): 9.0, (0,): 4.0, (1,): 5.0, (2,): 6.0, (0, 1): 3.0, (0, 2): 2.0}
    for greedy, order in ((False, [0, 1]), (True, [0, 2])):
        student, teacher = swapped(lambda: tiny_teacher("llama", num_hidden_layers=5), "kda")

        def score(model):
            kept = tuple(i for i, spec in enumerate(model.config.mixers) if spec is None)
            return losses.get(kept, 8.0)

        student, result = Select("select", every=2, by="recall", greedy=greedy).run(
            student, session(teacher, score=score)
        )
        found = result["layers"]["when_given_back"]
        assert found["order"] == order and found["by"] == "recall"
        assert found["alone"] == [4.0, 5.0, 6.0, 8.0, 8.0] and found["none"] == 9.0


@torch.no_grad()
def test_a_stopped_greedy_ranking_goes_on():
    """What was measured is not measured again, and the choice is that of a run that was not stopped."""
    choice, calls = Select("select", every=2, greedy=True), []

    def student_and_session(folder):
        student, teacher = swapped(lambda: tiny_teacher("llama", num_hidden_layers=5), "gate-swa")
        given = session(teacher, folder)
        texts = given.sequences(0)
        given.sequences = lambda tokens: calls.append(tokens) or texts
        return student, given

    _, straight = choice.run(*student_and_session(Kept()))
    assert len(calls) == 2
    kept = Kept(stop_after=0)
    with pytest.raises(Interrupted, match="after round 1"):
        choice.run(*student_and_session(kept))
    kept.stop_after = None
    student, resumed = choice.run(*student_and_session(kept))
    assert len(calls) == 4 and resumed == straight
    assert [i for i in range(5) if i not in student.slots()] == straight["layers"]["kept"]


def test_what_the_ledger_compares_is_every_field():
    plain = Select("select", every=3, by="recall").describe()
    assert plain == {"kind": "Select"} | dataclasses.asdict(Select("select", every=3, by="recall"))
