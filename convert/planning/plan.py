"""What a recipe would do to a teacher, from configurations alone: counts, memory, disk, time and refusals."""

import functools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.console import count, duration, size
from convert.core.errors import UserError
from convert.core.processes import launched
from convert.domains.base import Domain
from convert.mixers import MIXERS
from convert.mixers.init import STARTS
from convert.models.access import slots_of
from convert.planning.machine_speed import Rate, delta_rule_rate, matmul_rate, scan_rate
from convert.planning.validate import outline, problems
from convert.recipes.base import Recipe
from convert.steps import base
from convert.steps.base import PlanContext, StepPlan
from convert.training.parallel import floats_held
from convert.training.precision import uses_bfloat16

ShareTeacher = Literal["auto", "always", "never"]
MATMUL_SHARE = 0.5  # of the measured matrix-product rate that training reaches (ours, measured on neox-nano)


@dataclass(frozen=True)
class Plan:
    """What a run would do and cost, in each process. Sizes are in parameters, bytes and seconds; `refusals` say why it
    cannot work. `shares_teacher`: whether the processes share the teacher out among them."""

    teacher: str
    target: str
    data: str
    device: str
    unit: str
    parameters_teacher: int = 0
    parameters_student: int = 0
    shares_teacher: bool = False
    steps: tuple[StepPlan, ...] = ()
    disk_bytes: int = 0
    assumptions: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


def make_plan(
    domain: Domain,
    teacher: str,
    config: PreTrainedConfig,
    recipe: Recipe,
    data: str,
    device: str,
    teachers: Mapping[str, PreTrainedConfig] | None = None,
    share_teacher: ShareTeacher = "auto",
) -> Plan:
    """Plan a run. Counts come from the real modules on the meta device, time from rates measured on this machine.

    `teachers` are the configurations of the teachers that training steps name. `share_teacher`: whether several
    processes share the teacher out among them; "auto" where it does not fit a process beside all else."""
    teachers, shares = teachers or {}, launched() > 1 and domain.shares_models and share_teacher == "always"
    refused = functools.partial(Plan, teacher, recipe.target, data, device, domain.unit)
    if found := problems(domain, config, recipe, teachers):
        return refused(refusals=found)
    with torch.device("meta"):
        student = domain.empty_model(config)
    num_teacher = base.count(student)
    auto = all(uses_bfloat16(torch.device(device), settings.precision) for settings in recipe.trainings)
    dtype = torch.bfloat16 if auto else torch.float32
    speed = matmul_rate(device, dtype)
    context = PlanContext(
        domain=domain,
        config=config,
        num_teacher=num_teacher,
        held_teacher=_floats_of_teacher(shares, student),
        floats_of_teacher=functools.partial(_floats_of_teacher, shares),
        teachers=teachers,
        longest=max(settings.longest for settings in recipe.trainings),
        rate=speed.per_second * MATMUL_SHARE,
        scan_rate=lambda: scan_rate(device).per_second,
        rule_rate=lambda: delta_rule_rate(device).per_second,
        steps_per_state=8 if device.startswith("cuda") else 64,  # kernels.selective_scan, of many states
    )
    rows: list[StepPlan] = []
    for step in recipe.steps:
        try:
            student, row = step.plan(student, context)
        except UserError as error:
            return refused(refusals=(f"Step {step.name}: {error}",))
        rows.append(row)
    if launched() > 1 and domain.shares_models:
        peak, room = max(row.peak_bytes for row in rows), memory_of_process(torch.device(device))
        if peak > room and not shares and share_teacher == "auto":
            return make_plan(domain, teacher, config, recipe, data, device, teachers, "always")
        if reason := _too_large(peak, room, shares, device):
            return refused(refusals=(reason,))
    num_student, biggest = base.count(student), max(row.trainable for row in rows)
    end = functools.reduce(lambda at, step: step.after(at), recipe.steps, outline(domain, config, recipe, teachers))
    exports = 1 + any(name is not None and MIXERS[name].native_architecture is not None for name in end.mixers)
    return refused(
        parameters_teacher=num_teacher,
        parameters_student=num_student,
        shares_teacher=shares,
        steps=tuple(rows),
        disk_bytes=3 * 12 * biggest + 2 * 4 * num_student + exports * 4 * num_student,
        assumptions=tuple(_assumptions(domain, config, student, device, dtype, speed, shares)),
    )


def _floats_of_teacher(shares: bool, teacher: PreTrainedModel) -> float:
    """The floats that a process holds of a teacher."""
    return floats_held(teacher) if shares else base.count(teacher)


def shares_to_ask(domain: Domain, config: PreTrainedConfig, device: str, share_teacher: ShareTeacher) -> bool:
    """Whether processes that ask a teacher, and train nothing, share it out among them: with "auto", where its float32
    parameters take more than 0.8 (ours) of what a process may have. Raises UserError where a process cannot hold what
    it would."""
    if launched() == 1 or not domain.shares_models:
        return False
    with torch.device("meta"):
        teacher = domain.empty_model(config)
    room, whole = memory_of_process(torch.device(device)), 4 * base.count(teacher)
    shares = share_teacher == "always" or (share_teacher == "auto" and whole > 0.8 * room)
    if (held := 4 * int(floats_held(teacher)) if shares else whole) > room:
        raise UserError(
            f"Each of {launched()} processes would hold {size(held)} of the teacher, and has {size(room)}."
            f" {_way_out(shares, device)}."
        )
    return shares


def _way_out(shares: bool, device: str) -> str:
    """What several processes do that have too little memory; those of one computer's share it among them."""
    if not shares:
        return "Let them share the teacher out (--share-teacher always)"
    return "Start more processes" if device.startswith("cuda") else "Start fewer processes, or take more computers"


def _too_large(peak: int, room: int, shares: bool, device: str) -> str | None:
    """Why this many processes cannot hold a run, and the way out; None where they can."""
    if peak <= room:
        return None
    return (
        f"Each of {launched()} processes needs about {size(peak)} at the peak, and has {size(room)}."
        f" {_way_out(shares, device)}, or set smaller micro-batches (STEP.micro_tokens) or STEP.checkpointing=true."
    )


def _assumptions(
    domain: Domain,
    config: PreTrainedConfig,
    student: PreTrainedModel,
    device: str,
    dtype: torch.dtype,
    speed: Rate,
    shares: bool,
) -> Iterator[str]:
    """What the numbers of a plan rest on."""
    yield (
        f"{str(dtype).removeprefix('torch.')} matrix products at {speed.per_second / 1e9:,.0f} GFLOP/s on this"
        f" {device}, {MATMUL_SHARE:.0%} of it in training ({speed.origin})"
    )
    yield (
        "memory: float32 teacher and student, gradients and two Adam moments of what is trained, activations of one"
        " micro-batch"
    )
    if launched() > 1:
        held = "its part of the teacher" if shares else "the teacher whole"
        yield (
            f"{launched()} processes: each holds {held} and its part of a language model's parameters, gradients and"
            " moments, with two layers and the embeddings gathered. Time is that of a device for each, and of no"
            " exchange: large micro-batches need less of it"
        )
    yield (
        "disk: three checkpoints of the largest step (the third while it is written), two students, the exports;"
        " held-out measurements and data come on top of the time"
    )
    if any(slot.mixer.scan_updates() for slot in slots_of(student).values()):
        scans = scan_rate(device)
        yield (
            f"scans with a decay per state at {scans.per_second / 1e6:,.0f} M state updates/s, forward and backward"
            f" ({scans.origin})"
        )
    if any(slot.mixer.rule_operations() for slot in slots_of(student).values()):
        rules = delta_rule_rate(device)
        yield f"delta rules at {rules.per_second / 1e9:,.0f} GFLOP/s, forward and backward ({rules.origin})"
    names = {name for name in domain.outline(config)[1] if name and not STARTS[name].hands_on_all}
    if names and slots_of(student):
        yield (
            f"of the teacher's {', '.join(sorted(names))} only projections and feature maps are kept: its convolution,"
            " Delta, decay and gate start anew"
        )


def time_left(plan: Plan, results: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of training left after these finished steps: the plan's, times how much longer than planned
    they took, if they were a tenth of it."""
    planned = [step.seconds for step in plan.steps]
    done, left = sum(planned[: len(results)]), sum(planned[len(results) :])
    trained = sum(result["seconds"] for result, seconds in zip(results, planned, strict=False) if seconds)
    return left * trained / done if done > left / 10 else left  # a few seconds are mostly what comes between steps


def check_space(plan: Plan, folder: Path) -> str | None:
    """Return a sentence if the disk of `folder` has less room than the run needs, beside what it has written
    already."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = plan.disk_bytes - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if free < needed and not (folder / "report.json").exists():
        return (
            f"The run needs about {size(needed)} more on disk; {there} has {size(free)} free. Free some, or give --out"
            " elsewhere."
        )
    return None


def show(plan: Plan, console: Console) -> None:
    """Print the table a person reads before starting. Raises UserError for a plan that is refused, with the first
    of its reasons; the others are printed."""
    console.print(f"{plan.teacher} -> {plan.target}   data {plan.data}, device {plan.device}", style="bold")
    if plan.refusals:
        first, *others = plan.refusals
        for reason in others:
            console.print(f"refused: {reason}", style="red")
        raise UserError(first)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "what", plan.unit, "trained", "frozen", "peak memory", "time"):
        table.add_column(column, justify="left" if column in ("step", "what") else "right")
    for row in plan.steps:
        looks = [size(row.peak_bytes), duration(row.seconds)] if row.seconds else ["", ""]
        trains = [
            count(row.tokens),
            count(row.trainable),
            count(row.frozen),
            size(row.peak_bytes),
            duration(row.seconds),
        ]
        table.add_row(row.name, row.what, *(trains if row.tokens else ["", "", count(row.frozen), *looks]))
    console.print(table, soft_wrap=False)
    total, sampling = sum(row.seconds for row in plan.steps), sum(row.sampling_seconds for row in plan.steps)
    before = f"{duration(sampling)} of sampling before, " if sampling else ""
    console.print(
        f"teacher {count(plan.parameters_teacher)} parameters, student {count(plan.parameters_student)}; about"
        f" {duration(total)} of training, {before}{size(plan.disk_bytes)} of disk"
    )
    if names := ", ".join(row.name for row in plan.steps if row.is_without_teacher):
        console.print(
            f"the teacher is loaded at the start, leaves the memory before {names}, and is loaded again after it"
        )
    for line in plan.assumptions:
        console.print(f"assumes {line}", style="dim")


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_of_process(device: torch.device) -> int:
    """Return the bytes that a process of several may have: its device's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return physical_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken, of the device's memory or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in meminfo.read_text(encoding="utf-8").splitlines()
            if line.startswith("MemAvailable")
        )
    return physical_memory()
