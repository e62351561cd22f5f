"""The loop and the stages: losses fall, frozen stays frozen, accumulation and resume change nothing, bad steps are
survived."""

import dataclasses
import math

import numpy
import pytest
import torch

from convert.core.errors import Interrupted, UserError
from convert.data.batches import Batches
from convert.data.text import Tokens
from convert.evaluation.perplexity import perplexity
from convert.mixers import MIXERS
from convert.mixers.mamba_block import DecayRate, project_gradients
from convert.models.swap import swap
from convert.objectives.divergences import Distill
from convert.objectives.features import cosine_distance, energy_mse
from convert.training import loop as stages
from convert.training.align import align
from convert.training.distill import distill
from convert.training.loop import Silent
from convert.training.loop import Settings
from tests.conftest import assert_close, options_of, perturb, rms, tiny_teacher

SETTINGS = Settings(
    tokens=20 * 128,
    lr=1e-2,
    objective=cosine_distance,
    trains=stages.mixers,
    seq_len=32,
    batch_tokens=128,
    micro_tokens=128,
    precision="float32",
)


def tokens(length=4000):
    """Text with something to learn, in documents of 50 tokens."""
    ids = (torch.arange(length) * 7 % 23 + torch.arange(length) // 50 % 3).numpy()
    return Tokens(ids, torch.arange(0, length, 50).numpy())


def batches(settings=SETTINGS):
    return Batches(tokens(), settings.seq_len, settings.num_sequences, settings.seed)


def student_of(family, mixer="linear"):
    teacher = tiny_teacher(family)
    torch.manual_seed(0)
    return swap(teacher, mixer)


class Kept(Silent):
    """Keeps checkpoints in memory as a file would, and asks to stop after some steps."""

    def __init__(self, stop_after=None):
        self.states, self.steps, self.stop_after = {}, 0, stop_after

    def log(self, step, tokens, numbers):
        self.steps = step

    def load(self):
        return self.states[max(self.states)] if self.states else None

    def save(self, step, state):
        import io

        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.states[step] = torch.load(file, weights_only=True)

    def stop_requested(self):
        return self.stop_after is not None and self.steps >= self.stop_after


class Logged(Silent):
    def __init__(self):
        self.losses, self.norms = [], []

    def log(self, step, tokens, numbers):
        self.losses.append(numbers["train/loss"])
        self.norms.append(numbers["train/grad_norm"])


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
@pytest.mark.parametrize("objective", [cosine_distance, energy_mse], ids=lambda f: f.__name__)
def test_align_lowers_its_loss_and_touches_only_mixers(family, objective):
    teacher, student, log = tiny_teacher(family), student_of(family), Logged()
    frozen = {n: p.clone() for n, p in student.named_parameters() if ".mixer." not in n}
    taught = {n: p.clone() for n, p in teacher.named_parameters()}
    align(student, teacher, batches(), dataclasses.replace(SETTINGS, objective=objective), track=log)
    assert sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])
    for name, p in student.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name
    for name, p in teacher.named_parameters():
        assert torch.equal(p, taught[name]), name


def test_align_is_teacher_forced():
    """The loss of layer 2 does not depend on what layer 0 of the student is."""
    teacher, losses = tiny_teacher("llama"), []
    for noise in (0.0, 1.0):
        student = student_of("llama")
        with torch.no_grad():
            for p in student.slots()[0].parameters():
                p.add_(noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        per_layer = []
        one = dataclasses.replace(
            SETTINGS,
            tokens=128,
            objective=lambda s, t, per_layer=per_layer: (per_layer.append(cosine_distance(s, t)), per_layer[-1])[1],
        )
        align(student, teacher, batches(), one)
        losses.append([x.item() for x in per_layer])
    assert losses[0][1:] == losses[1][1:]
    assert losses[0][0] != losses[1][0]


@pytest.mark.parametrize(
    "objective",
    [Distill(), Distill(1.0, 0.0), Distill(0.0, 0.0, 1.0), Distill(0.5, 0.5, 0.0, 2.0)],
    ids=["kl", "ce", "reverse", "mixed"],
)
@pytest.mark.parametrize("mixer", ["linear", "mamba", "mamba2"])
def test_distill_lowers_its_loss_and_freezes_embeddings(objective, mixer):
    teacher, student, log = tiny_teacher("gpt_neox"), student_of("gpt_neox", mixer), Logged()
    with torch.no_grad():
        for p in stages.mixers(student):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ends = [student.get_input_embeddings().weight.clone(), student.get_output_embeddings().weight.clone()]
    distill(
        student,
        teacher,
        batches(),
        dataclasses.replace(SETTINGS, lr=3e-3, objective=objective, trains=stages.all_but_embeddings),
        track=log,
    )
    assert sum(log.losses[-4:]) < sum(log.losses[:4])
    assert torch.equal(student.get_input_embeddings().weight, ends[0])
    assert torch.equal(student.get_output_embeddings().weight, ends[1])
    assert not any(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("mixer", ["linear", "mamba", "mamba2"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
def test_bfloat16_products_teach_the_same(family, mixer):
    """Packed documents under autocast; the first loss is that of float32 to bfloat16's rounding, and it falls."""
    losses = []
    for precision in ("float32", "bfloat16"):
        log, settings = Logged(), dataclasses.replace(SETTINGS, lr=3e-3, precision=precision)
        student = align(
            student_of(family, mixer), tiny_teacher(family), batches(), dataclasses.replace(settings, tokens=256)
        )
        distill(student, tiny_teacher(family), batches(), dataclasses.replace(settings, objective=Distill()), track=log)
        losses.append(log.losses)
        assert all(p.dtype == torch.float32 for p in student.parameters())
    assert losses[0] != losses[1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)
    assert sum(losses[1][-4:]) < sum(losses[1][:4])


def test_cross_entropy_alone_does_not_run_the_teacher():
    """There is none; and the student learns the text."""
    log = Logged()
    distill(
        student_of("gpt_neox"),
        None,
        batches(),
        dataclasses.replace(SETTINGS, lr=3e-3, objective=Distill(1.0, 0.0)),
        track=log,
    )
    assert all(map(math.isfinite, log.losses)) and sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])


STAGES = {
    "cosine": (align, cosine_distance), "energy": (align, energy_mse), "kl": (distill, Distill()),
    "all terms": (distill, Distill(0.5, 0.5, 0.5, 2.0, feature_matching=0.5)),
}  # fmt: skip


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
    found, seen = {}, stages._norms
    settings = dataclasses.replace(
        settings, objective=objective, trains=stages.mixers if stage is align else stages.everything, clip=1e9
    )
    stages._norms = lambda student: (
        found.update({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}) or {}
    )
    try:
        stage(student, teacher, Batches(data, 32, 5), settings)
    finally:
        stages._norms = seen
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


@pytest.mark.parametrize("stage, objective", [(align, cosine_distance), (distill, Distill())], ids=["align", "distill"])
def test_backward_passes_run_without_autocast(stage, objective, monkeypatch):
    """An operator's own backward pass would else multiply in bfloat16, whatever it promises of its states."""
    seen, original = [], torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or original(*a, **k)
    )
    settings = dataclasses.replace(SETTINGS, tokens=128, precision="bfloat16", objective=objective)
    stage(student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox"), batches(), settings)
    assert seen and not any(seen)


def test_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        student = student_of("qwen3", "mamba2")
        distill(
            student,
            tiny_teacher("qwen3"),
            batches(),
            dataclasses.replace(SETTINGS, tokens=384, objective=Distill(), checkpointing=checkpointing),
        )
        results.append(torch.cat([p.flatten() for p in stages.mixers(student)]))
    assert torch.equal(*results)


@pytest.mark.parametrize("stop_after", [1, 7, 19])
@pytest.mark.parametrize("stage, objective", [(align, cosine_distance), (distill, Distill())], ids=["align", "distill"])
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


def test_non_finite_steps_are_skipped_then_refused():
    def objective(student, teacher):
        calls.append(1)
        return cosine_distance(student, teacher) * (float("nan") if bad(len(calls)) else 1.0)

    calls, student = [], student_of("gpt_neox")
    bad = lambda n: 4 <= n <= 6  # noqa: E731  the three layers of the second step
    settings = dataclasses.replace(SETTINGS, objective=objective)
    align(student, tiny_teacher("gpt_neox"), batches(), dataclasses.replace(settings, tokens=512))
    assert all(p.isfinite().all() for p in student.parameters())
    calls.clear()
    bad = lambda n: n > 9  # noqa: E731
    with pytest.raises(UserError, match="5 steps in a row had none .step 8"):
        align(student, tiny_teacher("gpt_neox"), batches(), settings)
    assert all(p.isfinite().all() for p in student.parameters())


def test_schedules():
    wsd = dataclasses.replace(SETTINGS, tokens=100 * 128, lr=1.0)
    rates = [wsd.rate(i) for i in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9:90] == [1.0] * 81
        and rates[-1] == pytest.approx(0.1)
        and min(rates) >= 0.02
    )
    cosine = dataclasses.replace(wsd, schedule="cosine")
    rates = [cosine.rate(i) for i in range(100)]
    assert rates[9] == 1.0 and rates[-1] == pytest.approx(0.02) and rates[54] == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize("select, expected", [("feature_maps", 12), ("mixers", 12 + 8 * 3 - 0), ("everything", None)])
def test_selectors_choose_by_module(select, expected):
    student = student_of("gpt_neox")
    chosen = stages.SELECTORS[select](student)
    names = [n for n, p in student.named_parameters() if any(p is c for c in chosen)]
    if select == "feature_maps":
        assert len(chosen) == expected and all("feature_" in n for n in names)
    elif select == "mixers":
        assert all(".mixer." in n for n in names) and len(names) == sum(
            ".mixer." in n for n, _ in student.named_parameters()
        )
    else:
        assert len(chosen) == len(list(student.parameters()))


def test_weight_decay_is_only_on_matrices():
    student = student_of("gpt_neox", "mamba")
    optimizer = stages._optimizer(student, dataclasses.replace(SETTINGS, trains=stages.everything))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {n for n, p in student.named_parameters() if id(p) in decayed}
    assert any("qkv.q.weight" in n for n in names)
    assert not any(n.endswith((".s", ".bias", "conv.weight", "norm.weight", "skip")) or "feature" in n for n in names)


def test_perplexity_by_hand():
    teacher, batch = tiny_teacher("llama"), batches()(0)
    with torch.no_grad():
        logits = teacher(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.log_softmax(-1)
    real = batch.labels != -100
    assert not real.all()
    nats = -logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0][real].mean()
    assert perplexity(teacher, [batch]) == pytest.approx(nats.exp().item(), rel=1e-5)


@pytest.mark.parametrize("micro_tokens", [128, 32])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_features_are_matched(family, micro_tokens):
    """Loss and gradient norm of a step are those of the plain formula: KL, and the mean cosine distance of all layers'
    outputs."""
    weight, log = 0.5, Logged()
    teacher, student = tiny_teacher(family), student_of(family)
    settings = dataclasses.replace(
        SETTINGS,
        tokens=128,
        micro_tokens=micro_tokens,
        objective=Distill(feature_matching=weight),
        trains=stages.everything,
        clip=1e9,
    )
    batch, found = batches()(0), []
    for model in (teacher, student):
        model.requires_grad_(model is student)
        with stages.layer_outputs(model) as outputs:
            hidden = stages.hidden_states(model, batch)
        found.append((outputs, model.get_output_embeddings()(hidden).log_softmax(-1)))
    (wanted, p), (outputs, q) = found
    assert len(outputs) == len(wanted) == 3
    real = batch.labels != -100
    kl = (p.exp() * (p - q)).sum(-1)[real].mean()
    distance = torch.stack(
        [(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean() for a, b in zip(outputs, wanted, strict=True)]
    )
    loss = kl + weight * distance.mean()
    assert weight * distance.mean().item() > 0.01 * loss.item()
    gradients = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
    distill(student, teacher, batches(), settings, track=log)
    assert log.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert log.norms[0] == pytest.approx(norm, rel=1e-4)
