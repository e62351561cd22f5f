"""The loop that every stage trains with; private to this package. A stage hands it `learn_from`, which spells out the
stage's loss."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.errors import Interrupted, UserError
from convert.core.processes import rank, summed
from convert.data.batches import StreamBatches
from convert.data.recorded import RecordedBatches
from convert.mixers.mamba_block import project_gradients
from convert.models.access import replaced_attention
from convert.models.sharding import reshard
from convert.objectives.base import LiveObjective
from convert.training import parallel
from convert.training.fetching import BatchOfStep, fetched
from convert.training.optimizer import Optimizers, optimizers_of, update
from convert.training.settings import StageSettings
from convert.training.state import Changed, other_version

NORMS = 50  # times in a stage that the sizes of weights and gradients are logged, layer by layer (ours)
BAD_STEPS_IN_A_ROW = 5  # non-finite gradients before a stage gives up (ours)

LearnFrom = Callable[[Any, Any], Tensor]  # see train()
Measure = Callable[[PreTrainedModel], dict[str, float]]


class Tracker(Protocol):
    """The receiver of the numbers of a stage."""

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        """The numbers of a step, after which the stage has seen so many tokens."""

    def resume(self, step: int) -> None:
        """The stage goes on after this step: rows beyond it are not part of it."""


class Keeper(Protocol):
    """The store of the checkpoints of a stage, and who asks it to stop."""

    def load(self, like: Mapping[str, Tensor] | None = None) -> dict | None:
        """The newest checkpoint, on the CPU; of parameters that are shared out as `like`, this process's rows."""

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint: tensors, numbers, and lists and dictionaries of them."""

    def stop_requested(self) -> bool:
        """Whether to save, and to stop with Interrupted."""


class Silent:
    """Tracks and keeps nothing: what a stage uses that is called by itself."""

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        pass

    def resume(self, step: int) -> None:
        pass

    def load(self, like: Mapping[str, Tensor] | None = None) -> dict | None:
        return None

    def save(self, step: int, state: dict) -> None:
        pass

    def stop_requested(self) -> bool:
        return False


@dataclass
class Progress:
    """The counts of a stage that its checkpoints keep."""

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    units: int = 0  # tokens, of which padding is none, or images
    seconds: float = 0.0  # of training, in all processes so far


def train(
    student: PreTrainedModel,
    learn_from: LearnFrom,
    batches: BatchOfStep,
    settings: StageSettings,
    objective: LiveObjective,
    *,
    track: Tracker | None,
    keep: Keeper | None,
    measure: Measure | None,
    optimizers: Optimizers | None = None,
    average: AveragedModel | None = None,
) -> PreTrainedModel:
    """Train the student in place and return it, frozen and in evaluation mode.

    `learn_from(batch, whole)` accumulates the gradients of a micro-batch's part of the loss of the whole batch, and
    returns that part. `measure(student)` returns more numbers to log, every `settings.evaluate_every` units.
    Where there is an `average` of the weights, it is what is measured, and what the student has in the end."""
    track, keep = track or Silent(), keep or Silent()
    parallel.check_shared_out(reshard(student))
    made = optimizers_of(student, settings, objective, optimizers)
    changed = Changed(student, objective, made, average)
    clipped = [*changed.trained.values(), *objective.parameters()]
    at = _restored(keep.load(changed.trained), changed, batches)
    track.resume(at.step)
    first_unit, first_second, started = at.units, at.seconds, time.monotonic()
    saved_at = started
    student.train()

    def altered(step: int) -> Any:
        return settings.altered(batches(step), step)

    device = next(student.parameters()).device
    with (
        _recomputing(student, settings.checkpointing),
        _progress_bar(at.step, settings) as bar,
        fetched(altered, settings.num_steps, device, settings.is_batch_own) as batch_of,
    ):
        while at.step < settings.num_steps:
            rate = settings.rate(at.step)
            batch = batch_of(at.step)
            loss, norm = _accumulate(learn_from, student, batch, settings, clipped)
            if math.isfinite(loss) and math.isfinite(norm):
                update(made, rate)
                if average is not None:
                    average.update_parameters(student)
                objective.advance(at.step / settings.num_steps)
                at.bad_in_a_row = 0
            else:
                objective.forget()
                at.skipped, at.bad_in_a_row = at.skipped + 1, at.bad_in_a_row + 1
            sizes = _norms(student) if at.step % max(1, settings.num_steps // NORMS) == 0 else {}
            for optimizer in made:
                optimizer.zero_grad()
            at.step, at.units = at.step + 1, at.units + batch.num_units
            at.seconds = first_second + time.monotonic() - started
            speed = (at.units - first_unit) / (at.seconds - first_second)
            numbers = {
                "train/loss": loss, "train/grad_norm": norm, "train/lr": rate, f"speed/{settings.unit}_per_s": speed,
                "train/skipped": at.skipped, "train/seconds": at.seconds,
            } | sizes  # fmt: skip
            _show(bar, loss, at, settings)
            if measure and _is_measurement_due(at.step, settings):
                numbers |= measure(student if average is None else average.module)
                reshard(student).train()
            track.log(at.step, at.units, numbers)
            _refuse_hopeless(at, rate)
            is_late = time.monotonic() - saved_at > settings.save_every and at.step < settings.num_steps
            is_stopped, is_late = _agreed(keep.stop_requested(), is_late)
            if is_stopped or is_late:
                keep.save(at.step, asdict(at) | changed.state() | _position(batches, at.step))
                saved_at = time.monotonic()
            if is_stopped:
                raise Interrupted(
                    f"Stopped at step {at.step} of {settings.num_steps}; it is saved. The same command goes on from"
                    " there."
                )
    if at.skipped == settings.num_steps:
        raise UserError(
            f"A stage must take steps; all {at.skipped} had gradients that are not finite. Lower the rate with --set"
            " STEP.lr=...."
        )
    if average is not None:
        student.load_state_dict(average.module.state_dict())
    for p in student.parameters():
        p.requires_grad_(False)
        p.grad = None
    return student.eval()


def _restored(state: dict | None, changed: Changed, batches: BatchOfStep) -> Progress:
    """Go on from a checkpoint, or from the start where there is none."""
    if state is None:
        return Progress()
    changed.put_back(state)
    if (stream := _stream(batches)) is not None and "stream" in state:
        stream.go_to(state["stream"])
    try:
        return Progress(**{field: state[field] for field in Progress.__dataclass_fields__})
    except LookupError as error:
        raise other_version(error) from error


def _position(batches: BatchOfStep, step: int) -> dict[str, Any]:
    """The place of a step's data in their files, if they are streamed."""
    stream = _stream(batches)
    return {} if stream is None else {"stream": stream.position(step)}


def _stream(batches: BatchOfStep) -> StreamBatches | None:
    inner = batches.batches if isinstance(batches, RecordedBatches) else batches
    return inner if isinstance(inner, StreamBatches) else None


def _agreed(is_stopped: bool, is_late: bool) -> tuple[bool, bool]:
    """Whether any process was asked to stop, and whether a checkpoint is due by the clock of the first."""
    stops, late = summed(is_stopped, is_late and rank() == 0)
    return bool(stops), bool(late)


@contextmanager
def _recomputing(student: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Each layer is computed again in the backward pass, where that is wanted."""
    if wanted:
        student.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if wanted:
            student.activation_checkpointing_disable()


def _accumulate(
    learn_from: LearnFrom,
    student: PreTrainedModel,
    batch: Any,
    settings: StageSettings,
    parameters: Sequence[nn.Parameter],
) -> tuple[float, float]:
    """The clipped gradients of a batch, micro-batch by micro-batch; its loss, and the norm that they had. Both are read
    from the device at once, when it has been told everything: reading waits for it."""
    device = next(student.parameters()).device
    own, statistics = parallel.shares(batch, settings.micro_units), parallel.Statistics(student)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for num_later, part, whole in own:
        loss += learn_from(part.to(device), whole)
        statistics.note(num_later, whole is batch)
    statistics.sum()
    parallel.sum_replicas(parameters)
    project_gradients(student)
    norm = parallel.clip_gradients(parameters, settings.clip)
    own_loss, norm_of_all = torch.stack([loss, norm.to(loss)]).tolist()
    return summed(own_loss)[0], norm_of_all


@torch.no_grad()
def _norms(student: PreTrainedModel) -> dict[str, float]:
    """The norms of the trained parameters of each new mixer and of their clipped gradients, read from the device at
    once."""
    found = {}
    for layer, mixer in replaced_attention(student).items():
        trained = [p for p in mixer.parameters() if p.grad is not None]
        if trained:
            found[f"weights/layer_{layer:02}"] = parallel.norm_of(p.detach() for p in trained)
            found[f"gradients/layer_{layer:02}"] = parallel.norm_of(p.grad for p in trained)
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def _is_measurement_due(step: int, settings: StageSettings) -> bool:
    """Whether this step's tokens completed another `evaluate_every`."""
    units, every = step * settings.batch_units, settings.evaluate_every
    return bool(every) and units // every > (units - settings.batch_units) // every


def _refuse_hopeless(at: Progress, rate: float) -> None:
    """Raises UserError after too many steps in a row without finite gradients."""
    if at.bad_in_a_row == BAD_STEPS_IN_A_ROW:
        raise UserError(
            f"Training must have finite gradients; {at.bad_in_a_row} steps in a row had none (step {at.step}, learning"
            f" rate {rate:.2g}). Lower the rate with --set STEP.lr=..., then start again with --fresh."
        )


def _progress_bar(step: int, settings: StageSettings) -> tqdm:
    total, done = settings.num_steps * settings.batch_units, step * settings.batch_units
    return tqdm(
        total=total, initial=done, unit=settings.abbreviation, unit_scale=True, dynamic_ncols=True, disable=rank() > 0
    )


def _show(bar: tqdm, loss: float, at: Progress, settings: StageSettings) -> None:
    bar.update(settings.batch_units)
    bar.set_postfix_str(f"loss {loss:.4f}" + (f", {at.skipped} skipped" if at.skipped else ""), refresh=False)
