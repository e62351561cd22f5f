"""Stages that several processes must train as one does: each case gives the gradients of its first step, and the losses
and norms of three steps."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from convert.core.processes import share
from convert.data.batches import Batches
from convert.data.text import Tokens
from convert.evaluation.perplexity import compare, perplexity, perplexity_by_position
from convert.models.access import slots_of
from convert.models.sharding import copied, is_shared_out, reshard, whole
from convert.models.swap import swap
from convert.objectives import Objective
from convert.steps import selection
from convert.steps.calibration import inputs_of
from convert.steps.refit import refit_outputs
from convert.training import loop, parallel
from convert.training.align import align
from convert.training.distill import distill
from tests.conftest import options_of, perturb, tiny_teacher
from tests.training.stages import SETTINGS, Logged, tokens

ALL_TERMS = "0.5*cross_entropy + 0.5*forward_kl(temperature=2) + 0.5*feature_matching"
# documents of one token have no next one: some rows, and micro-batches, have no target
SHORT = Tokens(tokens().ids, numpy.concatenate([numpy.arange(0, 3000, 50), numpy.arange(3000, 4000)]))


@dataclass(frozen=True)
class Case:
    stage: Callable[..., Any]
    family: str
    mixer: str | None
    objective: str
    is_tied: bool = False
    layers: tuple[int, ...] | None = None
    checkpointing: bool = False
    noise: float = 0.0


CASES = {
    "distill gpt_neox linear": Case(distill, "gpt_neox", "linear", ALL_TERMS, noise=0.1),
    "distill tied llama mamba": Case(distill, "llama", "mamba", "forward_kl", is_tied=True, checkpointing=True),
    "distill tied qwen3 mla": Case(distill, "qwen3", "mla", "taid + 0.5*hidden_projection", is_tied=True),
    "distill tied gpt_neox mamba2": Case(distill, "gpt_neox", "mamba2", ALL_TERMS, is_tied=True),
    "distill llama kda hybrid": Case(distill, "llama", "kda", ALL_TERMS, layers=(0, 2)),
    "distill plain llama": Case(distill, "llama", None, "cross_entropy"),
    "align gpt_neox gate-swa": Case(align, "gpt_neox", "gate-swa", "energy_mse"),
    "align qwen3 mamba2": Case(align, "qwen3", "mamba2", "block_energy_mse + 0.5*block_l2_distance + energy_mse"),
    "align tied llama gdn": Case(align, "llama", "gdn", "cosine_distance", is_tied=True),
}


@dataclass
class Found:
    gradients: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    perplexity: float
    comparison: tuple[float, ...]


def student_of(case: Case) -> Any:
    """A student that has left its start; a third of its decay rates are at their bound, a third below it."""
    model = tiny_teacher(case.family, tie_word_embeddings=case.is_tied)
    torch.manual_seed(0)
    if case.mixer is not None:
        model = swap(model, case.mixer, options_of(case.mixer), case.layers)
    for slot in slots_of(model).values():
        perturb(slot.mixer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("rate.s"):
                p.sub_(p.quantile(1 / 3)).masked_fill_((p < p.quantile(2 / 3)) & (p > 0), 0.0)
    return model


def found(name: str) -> Found:
    """What a case gives, in one process or among several. The student is measured in the stage, too, which gathers
    parts of it."""
    case = CASES[name]
    settings = dataclasses.replace(
        SETTINGS, tokens=480, batch_tokens=160, micro_tokens=64, lr=1e-4, clip=0.5, loss_chunk=17, evaluate_every=320,
        objective=Objective.of(case.objective), trains="mixers" if case.stage is align else "everything",
        checkpointing=case.checkpointing, noise=case.noise,
    )  # fmt: skip
    gradients: dict[str, Tensor] = {}
    seen, track = loop._norms, Logged()

    def norms(student: Any) -> dict[str, float]:
        for key, p in student.named_parameters():
            if p.grad is not None and len(track.losses) == 0:
                gradients[key] = whole(p.grad).clone()
        return seen(student)

    teacher = tiny_teacher(case.family, tie_word_embeddings=case.is_tied)
    batches = Batches(SHORT, 32, 5, 3)
    loop._norms = norms
    student = copied(student_of(case))
    perplexity(student, [batches(0)])  # as in a run, which leaves parts of it gathered
    try:
        student = parallel.in_parts(
            case.stage, student, teacher, batches, settings, track=track,
            measure=lambda model: {"perplexity": perplexity(model, [batches(0), batches(1), batches(2)])},
        )  # fmt: skip
    finally:
        loop._norms = seen
    both = compare(student, teacher, [batches(3), batches(4)])
    measured = (both.perplexity_student, both.top1, both.kl_nats, both.tokens)
    return Found(gradients, track.losses, track.norms, perplexity(student, [batches(3)]), measured)


def all_found(names: Iterable[str]) -> dict[str, Found]:
    return {name: found(name) for name in names}


def looked() -> dict[str, Tensor]:
    """What swaps measure of a model over five batches: the inputs of its layers, which layer matters, and output
    projections that are solved for what the teacher's attention gives; several processes share both models out."""
    teacher, batches = copied(tiny_teacher("llama")), [Batches(SHORT, 32, 1, 3)(i) for i in range(5)]
    seen = inputs_of(teacher, batches, look_back=True)
    given = {f"{name} {i}": t for i, stats in enumerate(seen) for name, t in vars(stats).items()}
    torch.manual_seed(0)  # a swap draws what is new
    student, before = swap(copied(teacher), "kda"), teacher if is_shared_out(teacher) else selection.parts_of(teacher)
    given["sensitivity"] = torch.tensor(selection.sensitivity(student, before, batches))
    refit_outputs(reshard(student), teacher, batches, (0, 2))
    by_position = perplexity_by_position(student, batches)
    given["perplexity"] = torch.tensor([perplexity(student, batches[:1]), *by_position.values()])
    given |= {f"out {i}": whole(reshard(student).slots()[i].mixer.out.weight.detach()).clone() for i in (0, 2)}
    parts = selection.copies_of(teacher)
    given["given back"] = torch.tensor(selection.kl_when_given_back(student, parts, (0, 1, 2), teacher, batches))
    for slot in reshard(student).slots().values():
        slot.mixer.set_decay(0.3)
    student = selection.give_back(student, teacher, [1])
    given["of a hybrid"] = torch.tensor([perplexity(student, batches), len(student.slots())])
    return given


def all_found_and_looked(names: Iterable[str]) -> tuple[dict[str, Found], dict[str, Tensor]]:
    return all_found(names), looked()


FAULTY = "distill gpt_neox linear"


def all_faults() -> dict[str, Found | str]:
    """What a case gives where a part of the work is left out: the numbers, or what was said."""
    given: dict[str, Found | str] = {}
    everything_counts = lambda items: [(i, item, True) for i, item, _ in share(items)]  # noqa: E731
    left_out = {
        "the factor of gradients": [(FSDPModule, "set_gradient_divide_factor", lambda *_: None)],
        "the weight 0": [(parallel, "share", everything_counts)],
        "reshard": [(loop, "reshard", lambda model: model)],
        "reshard, and its check": [
            (loop, "reshard", lambda model: model),
            (parallel, "check_shared_out", lambda _: None),
        ],
        "the sum of what terms own": [(parallel, "sum_replicas", lambda _: None)],
    }
    for name, changes in left_out.items():
        case = "distill tied qwen3 mla" if "own" in name else FAULTY
        with pytest.MonkeyPatch.context() as patched:
            for change in changes:
                patched.setattr(*change)
            try:
                given[name] = found(case)
            except RuntimeError as error:
                given[name] = str(error)
    return given
