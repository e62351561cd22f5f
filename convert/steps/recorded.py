"""Training steps and recordings of a teacher: which recording fits a step, and how one is made for it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.places import path_of
from convert.core.processes import gathered, on_first, rank, world
from convert.data.batches import Batch
from convert.data.recorded import Recording
from convert.models.sharding import is_shared_out
from convert.steps.base import Step
from convert.training.recording import passes_of_others, records_of, take_part
from convert.training.settings import Settings

PREFIX = "cache:"  # of a step's teacher, before the folder of a recording


def folder_of(teacher: str | None) -> Path | None:
    """The folder of a recording that a step's teacher names; None where it names a model or nothing."""
    return None if teacher is None or not teacher.startswith(PREFIX) else path_of(teacher.removeprefix(PREFIX), PREFIX)


def batches_of(settings: Settings) -> dict[str, Any]:
    """What the batches of a step depend on, beside its data: a recording is of these alone. Noise is drawn over a whole
    batch, so its size counts."""
    names = ("seed", "seq_len", "batch_tokens", "noise", "masking")
    return {name: getattr(settings, name) for name in names} | {"steps": settings.num_steps}


def step_to_record(steps: Sequence[Step], name: str) -> tuple[Step, Settings]:
    """The step of that name, and its settings. Raises UserError where no recording can be made for it."""
    fitting = {step.name: (step, step.training) for step in steps if isinstance(step.training, Settings)}
    if name not in fitting:
        raise UserError(f"A recording is for a step that trains on text: {', '.join(fitting)}; there is no {name!r}.")
    step, settings = fitting[name]
    if step.own_teacher is not None or step.recorded is not None:
        raise UserError(f"A recording is of the run's teacher; step {name} has another. Leave out {name}.teacher.")
    for _, term in settings.objective.terms:
        if reason := term.why_not_recorded():
            raise UserError(f"A recording is not enough for step {name}: its objective has {term}, {reason}.")
    return step, settings


def record(recording: Recording, teacher: PreTrainedModel, batches: Callable[[int], Batch], settings: Settings) -> None:
    """Write what is missing of a recording that is open, each process its parts, and then DONE. Processes that share
    the teacher out go from batch to batch together."""
    about, steps = recording.about, recording.parts()
    own = [i for i in range(rank(), len(steps), world()) if not recording.is_whole(i)]
    num_batches = sum(len(steps[i]) for i in own)
    idle = max(gathered(num_batches)) - num_batches if is_shared_out(teacher) else 0
    total = (num_batches + idle) * settings.batch_tokens
    with tqdm(total=total, unit="tok", unit_scale=True, desc="record", dynamic_ncols=True, disable=rank() > 0) as bar:
        for number in own:
            found = []
            for step in steps[number]:
                batch = settings.altered(batches(step), step)
                found.append(records_of(teacher, batch, step, settings, about["kept"]))
                bar.update(settings.batch_tokens)
            recording.write(number, found)
        for _ in range(idle):
            take_part(teacher, passes_of_others(teacher, 0))
            bar.update(settings.batch_tokens)
    gathered(None)  # all have written
    on_first(recording.finish)


def about(origins: Mapping[str, str], settings: Settings, kept: Mapping[str, int]) -> dict[str, Any]:
    """The description of a recording (see `Recording`)."""
    return {"of": dict(origins), "batches": batches_of(settings), "kept": dict(kept)}
