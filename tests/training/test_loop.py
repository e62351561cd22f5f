"""The loop: accumulation, checkpointing and resume change nothing, bad steps are survived."""

import dataclasses

import numpy
import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import Interrupted, UserError
from convert.data.batches import Batch, Batches
from convert.data.text import Tokens
from convert.mixers import MIXERS
from convert.mixers.mamba_block import DecayRate, project_gradients
from convert.models.access import hidden_states
from convert.models.swap import swap
from convert.objectives import AttentionTerm, Objective
from convert.objectives.features import cosine_distance
from convert.training import loop
from convert.training.align import align
from convert.training.distill import distill
from convert.training.selectors import mixers
from tests.conftest import assert_close, options_of, perturb, rms, tiny_teacher
from tests.training.stages import SETTINGS, Kept, Logged, Reads, batches, student_of, tokens

KL = Objective.of("forward_kl")
STAGES = {
    "cosine": (align, Objective.of("cosine_distance")),
    "energy": (align, Objective.of("energy_mse")),
    "blocks": (align, Objective.of("block_energy_mse + 0.5*block_l2_distance + energy_mse")),
    "kl": (distill, KL),
    "all terms": (
        distill,
        Objective.of(
            "0.5*cross_entropy + 0.5*forward_kl(temperature=2) + 0.5*reverse_kl(temperature=2) + 0.5*feature_matching"
        ),
    ),
    "terms that own something": (distill, Objective.of("taid + 0.5*hidden_projection")),
}


def gradients_of(stage, objective, mixer: str, micro_rows: int, data: Tokens) -> dict[str, torch.Tensor]:
    """The gradients of one step over five sequences, all parameters trained, of a student that has left its start: a
    third of its decay rates are at their bound, a third below it."""
    teacher, settings = (
        tiny_teacher("gpt_neox"),
        dataclasses.replace(SETTINGS, tokens=160, batch_tokens=160, micro_tokens=32 * micro_rows),
    )
    torch.manual_seed(0)
    student = swap(tiny_teacher("gpt_neox"), mixer, options_of(mixer))
    for slot in student.slots().values():
        perturb(slot.mixer)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name.endswith("rate.s"):
                p.sub_(p.quantile(1 / 3)).masked_fill_((p < p.quantile(2 / 3)) & (p > 0), 0.0)
    found, seen = {}, loop._norms
    settings = dataclasses.replace(
        settings, objective=objective, trains="mixers" if stage is align else "everything", clip=1e9
    )
    loop._norms = lambda student: (
        found.update({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}) or {}
    )
    try:
        stage(student, teacher, Batches(data, 32, 5), settings)
    finally:
        loop._norms = seen
    return found


def assert_same_gradients(cut: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    """Parameter by parameter, to float32's rounding of sums that cancel."""
    assert whole and cut.keys() == whole.keys()
    floor = 1e-2 * max(rms(gradient) for gradient in whole.values())
    for parameter, gradient in whole.items():
        assert_close(cut[parameter], gradient, 2e-5, floor=floor)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", STAGES)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(name, mixer):
    """Of every trained parameter. Micro-batches have different numbers of targets (document borders), and some rates
    have gradients of one sign in one and of the other in the next."""
    whole = gradients_of(*STAGES[name], mixer, 5, tokens())
    for rows in (2, 1):
        cut = gradients_of(*STAGES[name], mixer, rows, tokens())
        assert_same_gradients(cut, whole)
    shares = [batch.num_targets for batch in Batches(tokens(), 32, 5)(0).split(1)]
    assert len(set(shares)) > 1


def test_rows_without_targets_teach_what_needs_none():
    """Documents of one token have no next one: their layers' outputs are learnt all the same, however the batch is
    cut."""
    short = Tokens(tokens().ids, numpy.concatenate([numpy.arange(0, 3000, 50), numpy.arange(3000, 4000)]))
    assert {batch.num_targets for batch in Batches(short, 32, 5, 3)(0).split(1)} >= {0}
    for name in ("cosine", "all terms"):
        assert_same_gradients(*(gradients_of(*STAGES[name], "mamba2", rows, short) for rows in (1, 5)))


def test_rates_at_their_bound_pass_only_what_raises_them():
    rate = DecayRate(6)
    with torch.no_grad():
        rate.s.copy_(torch.tensor([0.1, 0.1, 0.0, 0.0, -0.1, -0.1]))
    (rate() * torch.tensor([1.0, -1, 1, -1, 1, -1])).sum().backward()
    project_gradients(rate)
    assert (rate.s.grad.sign() == torch.tensor([1, -1, 0, -1, 0, -1])).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing_changes_nothing(mixer):
    results = []
    for checkpointing in (False, True):
        student = student_of("qwen3", mixer)
        distill(
            student,
            tiny_teacher("qwen3"),
            batches(),
            dataclasses.replace(SETTINGS, tokens=384, objective=KL, checkpointing=checkpointing),
        )
        results.append(torch.cat([p.flatten() for p in mixers(student)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("stop_after", [1, 7, 19])
@pytest.mark.parametrize(
    "stage, objective", [(align, Objective.of("cosine_distance")), (distill, KL)], ids=["align", "distill"]
)
def test_stopped_and_resumed_is_bit_identical(stage, objective, stop_after):
    settings = dataclasses.replace(SETTINGS, objective=objective)
    straight = stage(student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox"), batches(), settings)
    keep = Kept(stop_after)
    with pytest.raises(Interrupted, match=f"Stopped at step {stop_after} of 20"):
        stage(student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox"), batches(), settings, track=keep, keep=keep)
    keep.stop_after = None
    resumed = stage(
        student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox"), batches(), settings, track=keep, keep=keep
    )
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "alter",
    [
        *(lambda state, key=key: state.pop(key) for key in ("parts", "buffers", "objective", "rng", "units")),
        lambda state: state["parts"].popitem(),
        lambda state: next(iter(state["parts"].values())).update(value=torch.zeros(3, 5, 7)),
        lambda state: next(iter(state["parts"].values())).pop("value"),
        lambda state: state["buffers"].update(another=torch.zeros(1)),
        lambda state: state["objective"].popitem(),
        lambda state: state["owned"].update(another={}),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_words(alter):
    keep = Kept(1)
    settings = dataclasses.replace(SETTINGS, objective=Objective.of("taid"))
    run = lambda: distill(  # noqa: E731
        student_of("gpt_neox"), tiny_teacher("gpt_neox"), batches(), settings, track=keep, keep=keep
    )
    with pytest.raises(Interrupted):
        run()
    alter(keep.states[1])
    with pytest.raises(UserError, match="^The checkpoint of an unfinished step must hold what this version .* --fresh"):
        run()


def test_non_finite_steps_are_skipped_then_refused():
    class Bad(AttentionTerm):
        def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
            calls.append(1)
            return cosine_distance(student, teacher) * (float("nan") if bad(len(calls)) else 1.0)

    calls, student = [], student_of("gpt_neox")
    bad = lambda n: 4 <= n <= 6  # noqa: E731  the three layers of the second step
    settings = dataclasses.replace(SETTINGS, objective=Objective(((1, Bad()),)))
    align(student, tiny_teacher("gpt_neox"), batches(), dataclasses.replace(settings, tokens=512))
    assert all(p.isfinite().all() for p in student.parameters())
    calls.clear()
    bad = lambda n: n > 9  # noqa: E731
    with pytest.raises(UserError, match="5 steps in a row had none .step 8"):
        align(student, tiny_teacher("gpt_neox"), batches(), settings)
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", ["cosine", "kl", "all terms"])
def test_micro_batches_read_nothing_but_documents_from_the_device(name):
    """A model looks once whether its rows have several documents; of losses, norms and targets nothing is read before
    the end of a step, however many micro-batches it has."""
    stage, objective = STAGES[name]
    teacher, student, counts = tiny_teacher("gpt_neox"), student_of("gpt_neox"), {}
    settings = dataclasses.replace(SETTINGS, tokens=128, objective=objective)
    for rows in (4, 1):
        with Reads() as reads:
            stage(student, teacher, batches(), dataclasses.replace(settings, micro_tokens=32 * rows))
        counts[rows] = reads.count
    with torch.no_grad(), Reads() as of_a_pass:
        for model in (teacher, student):
            hidden_states(model, batches()(0))
    assert of_a_pass.count and counts[1] - counts[4] == 3 * of_a_pass.count


def test_the_loss_is_the_sum_of_its_parts_in_double_precision():
    """Bit for bit as Python adds what each micro-batch gives."""
    student, parts, logged = student_of("gpt_neox"), [], Logged()
    weight = mixers(student)[0]

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        loss = (weight.square().sum() * batch.input_ids.float().std()).div(whole.num_targets)
        loss.backward()
        parts.append(loss.item())
        return loss.detach()

    settings = dataclasses.replace(SETTINGS, tokens=3 * 128, micro_tokens=32)
    objective = settings.objective.build(student, None)
    given = {"track": logged, "keep": None, "measure": None}
    loop.train(student, learn_from, batches(), settings, objective, **given)
    assert logged.losses == [sum(parts[i : i + 4]) for i in (0, 4, 8)] and len(set(parts)) > 4
    assert logged.losses != [torch.tensor(parts[i : i + 4]).sum().item() for i in (0, 4, 8)]
