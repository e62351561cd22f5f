"""What a recipe would do to a teacher, from configurations alone: counts, memory, disk, time and refusals."""

import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.core.console import count, duration, size
from convert.core.errors import UserError
from convert.mixers import MIXERS
from convert.mixers.parts import DecayRate
from convert.mixers.projections import Inputs
from convert.models.student import ConvertedForCausalLM, projections_of, swap
from convert.planning.validate import bad_functions, refusals
from convert.recipes.base import Forget, OneIn, Recipe, Swap, Train, objective_of
from convert.recipes.language import HANDOVER_TOKENS, RANKING_TOKENS
from convert.training.loop import align, uses_bfloat16
from kernels.selective_scan import selective_scan

SEEN = Inputs(*(torch.empty(0, device="meta") for _ in range(4)))  # of a calibration that is yet to come
MATMUL_SHARE = 0.5  # of the measured matrix-product rate that training reaches (ours, measured on neox-nano)


@dataclass(frozen=True)
class StepPlan:
    name: str
    what: str
    tokens: int
    trainable: int
    frozen: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    teacher: str
    target: str
    data: str
    device: str
    parameters_teacher: int
    parameters_student: int
    steps: tuple[StepPlan, ...]
    disk_bytes: int
    assumptions: tuple[str, ...]
    refusals: tuple[str, ...]


def make_plan(teacher: str, config: PreTrainedConfig, recipe: Recipe, data: str, device: str) -> Plan:
    """Counts come from the real modules on the meta device; time from rates measured here in a second."""
    if found := refusals(config, recipe):
        return Plan(teacher, recipe.target, data, device, 0, 0, (), 0, (), found)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_teacher, num_layers = _count(model), config.num_hidden_layers
    precisions = {step.settings.precision for step in recipe.steps if isinstance(step, Train)}
    dtype = torch.bfloat16 if all(uses_bfloat16(torch.device(device), p) for p in precisions) else torch.float32
    flops = _matmul_rate(device, dtype)
    student, rows, biggest = model, [], 0
    for step in recipe.steps:
        if isinstance(step, Swap):
            try:
                student = _swapped(step, student, num_layers)
            except UserError as error:
                return Plan(teacher, recipe.target, data, device, 0, 0, (), 0, (), (f"Step {step.name}: {error}",))
            rows.append(_swap_plan(step, student, num_teacher, flops, num_layers, recipe))
        elif isinstance(step, Forget):
            rows.append(StepPlan(step.name, f"decay rate {step.rate:g}", 0, 0, _count(student), 0, 0.0))
        else:
            if reason := bad_functions(step, student):
                return Plan(teacher, recipe.target, data, device, 0, 0, (), 0, (), (reason,))
            rows.append(_train_plan(step, student, num_teacher, flops, device))
            biggest = max(biggest, rows[-1].trainable)
    num_student = _count(student)
    exports = (
        2 if any(isinstance(step, Swap) and step.mixer == "mla" for step in recipe.steps) else 1
    )  # model/, and native/
    disk = 3 * 12 * biggest + 2 * 4 * num_student + exports * 4 * num_student
    assumptions = (
        (
            f"{str(dtype).removeprefix('torch.')} matrix products at {flops / 1e9:,.0f} GFLOP/s (measured on this"
            f" {device} now), {MATMUL_SHARE:.0%} of it in training"
        ),
        (
            "memory: float32 teacher and student, gradients and two Adam moments of what is trained, activations of one"
            " micro-batch"
        ),
        (
            "disk: three checkpoints of the largest step (the third while it is written), two students, the exports;"
            " held-out measurements and data come on top of the time"
        ),
    )
    if _state_updates(student):
        assumptions += (
            (
                f"scans with a decay per state at {_scan_rate(device) / 1e6:,.0f} M state updates/s, forward and"
                " backward (measured now)"
            ),
        )
    names = {mixer["name"] for mixer in config.mixers if mixer} - {"linear"} if config.model_type == "converted" else ()
    if names:
        assumptions += (
            (
                f"of the teacher's {', '.join(sorted(names))} only projections and feature maps are kept: its"
                " convolution, Delta, decay and gate start anew"
            ),
        )
    return Plan(teacher, recipe.target, data, device, num_teacher, num_student, tuple(rows), disk, assumptions, ())


def _swapped(step: Swap, student: PreTrainedModel, num_layers: int) -> ConvertedForCausalLM:
    """The student after the swap. Raises UserError where that cannot be, or where it should be exact and theory says
    that it is not."""
    layers, tokens = step.edited(num_layers), min(HANDOVER_TOKENS, student.config.max_position_embeddings)
    before = {layer: projections_of(student, layer) for layer in layers}
    slots = student.slots() if isinstance(student, ConvertedForCausalLM) else {}
    partial = {layer for layer, slot in slots.items() if not slot.mixer.whole}
    student = swap(student, step.mixer, step.options, layers, [SEEN] * num_layers if step.looks_first else None)
    for layer in layers if step.exact else ():
        reason = MIXERS[step.mixer].inexact(before[layer], student.slots()[layer].mixer.options, tokens)
        if layer in partial:
            reason = (
                "the mixer it has now computes more than the new one takes over; swap in linear attention and align it"
                " first"
            )
        if reason:
            raise UserError(
                f"An exact edit must not change the function, and that of layer {layer} would: {reason}, or set"
                " exact=false."
            )
    return student


def _swap_plan(
    step: Swap, student: ConvertedForCausalLM, num_teacher: int, flops: float, num_layers: int, recipe: Recipe
) -> StepPlan:
    """What a look at the layers' inputs, and a ranking, take: two moments of each layer's inputs are held, and
    attention over one text."""
    config, total = student.host.config, _count(student)
    looks = step.calibration if step.looks_first else 0
    ranks = RANKING_TOKENS * num_layers / 2 if isinstance(step.keep, OneIn) and step.keep.measured else 0
    longest = max(s.settings.seq_len for s in recipe.steps if isinstance(s, Train))
    held = 4 * (2 * num_layers * config.hidden_size**2 + 4 * longest**2) if looks else 0
    peak = 4 * (num_teacher + total) + held if looks or ranks else 0
    return StepPlan(
        step.name,
        _what(step, num_layers),
        0,
        0,
        total,
        peak,
        (looks + ranks) * 2 * num_teacher / (flops * MATMUL_SHARE),
    )


def _what(step: Swap, num_layers: int) -> str:
    kept = num_layers - len(step.edited(num_layers))
    by = ", by measurement" if isinstance(step.keep, OneIn) and step.keep.measured else ""
    return (
        f"swap in {step.mixer}"
        + (f", keep {kept} of {num_layers} layers{by}" if kept else "")
        + (", must be exact" if step.exact else "")
    )


def _count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def _train_plan(step: Train, student: ConvertedForCausalLM, num_teacher: int, flops: float, device: str) -> StepPlan:
    s = step.settings
    trainable, total = sum(p.numel() for p in s.trains(student)), _count(student)
    mixers = sum(p.numel() for slot in student.slots().values() for p in slot.parameters())
    config = student.host.config
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = width * 18 + config.intermediate_size * 3  # floats a layer keeps for its backward pass, per token (ours)
    kept_layers = 1 if step.stage is align or s.checkpointing else layers
    activations = 4 * s.micro_tokens * (kept_layers * inner + layers * width)
    logits = 4 * 3 * min(s.loss_chunk, s.micro_tokens) * config.vocab_size
    forward = 2 * num_teacher
    per_token = forward + 6 * mixers if step.stage is align else forward + (8 if s.checkpointing else 6) * total
    scan = _state_updates(student) / _scan_rate(device) if _state_updates(student) else 0.0
    seconds = s.num_steps * s.batch_tokens * (per_token / (flops * MATMUL_SHARE) + scan)
    what = f"{step.stage.__name__}: {objective_of(step)}, trains {s.trains.__name__}"
    return StepPlan(
        step.name,
        what,
        s.tokens,
        trainable,
        total - trainable,
        4 * (num_teacher + total + 3 * trainable) + activations + logits,
        seconds,
    )


@functools.cache
def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product."""
    n = 512 if device == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    return _rate(lambda: a @ a, 2 * n**3, a.device)


def _state_updates(student: ConvertedForCausalLM) -> int:
    """Of numerators and denominators with a decay of their own, per token."""
    rates = [module.s for module in student.modules() if isinstance(module, DecayRate)]
    return sum(2 * rate.numel() for rate in rates if rate.ndim == 2)


@functools.cache
def _scan_rate(device: str) -> float:
    """State updates per second, forward and backward, of the selective scan."""
    shape = {"device": device, "requires_grad": True}
    u, delta = (torch.rand(2, 512, 64, **shape) for _ in range(2))
    A, B = torch.rand(512, 64, **shape), torch.rand(2, 64, 64, **shape)
    return _rate(lambda: selective_scan(u, delta, -A, B, B).sum().backward(), u.numel() * 64, u.device)


def _rate(call: Callable[[], object], work: float, device: torch.device) -> float:
    """Work per second, of the best of many calls: other programs only ever make one slower. On a CPU also by one
    thread, and each further one counted half: beside other programs threads that wait for each other are forty times as
    slow at one moment, one thread never is."""
    found = work / _best(call, device)
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return found
    try:
        torch.set_num_threads(1)
        return max(found, work / _best(call, device) * (1 + threads) / 2)
    finally:
        torch.set_num_threads(threads)


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest call within half a second."""
    call()  # compiles, and wakes the device
    times, ends = [], time.perf_counter() + 0.5
    while not times or time.perf_counter() < ends:
        _finish(device)
        start = time.perf_counter()
        call()
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _finish(device: torch.device) -> None:
    """Wait for all that the device was asked to do."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def time_left(plan: Plan, results: Sequence[dict]) -> float:
    """Seconds of training after these finished steps: the plan's, times how much longer than planned they took, if they
    were a tenth of it."""
    planned = [step.seconds for step in plan.steps]
    done, left = sum(planned[: len(results)]), sum(planned[len(results) :])
    trained = sum(result["seconds"] for result, seconds in zip(results, planned, strict=False) if seconds)
    return left * trained / done if done > left / 10 else left  # a few seconds are mostly what comes between steps


def check_space(plan: Plan, folder: Path) -> str | None:
    """A sentence if the disk of `folder` has less room than the run needs, beside what it has written already."""
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
    """The table a person reads before starting."""
    console.print(f"{plan.teacher} -> {plan.target}   data {plan.data}, device {plan.device}", style="bold")
    for reason in plan.refusals:
        console.print(f"refused: {reason}", style="red")
    if plan.refusals:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "what", "tokens", "trained", "frozen", "peak memory", "time"):
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
    total = sum(row.seconds for row in plan.steps)
    console.print(
        f"teacher {count(plan.parameters_teacher)} parameters, student {count(plan.parameters_student)}; about"
        f" {duration(total)} of training, {size(plan.disk_bytes)} of disk"
    )
    for line in plan.assumptions:
        console.print(f"assumes {line}", style="dim")


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken, of the device's memory or of the machine's."""
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
