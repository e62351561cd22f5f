"""What a recipe would do to a teacher, from configurations alone: counts, memory, disk, time and refusals."""

import dataclasses
import functools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig

from convert.errors import UserError
from convert.mixers.parts import DecayRate
from convert.model import ConvertedForCausalLM, swap
from convert.objectives import Distill
from convert.projections import Inputs, refusal
from convert.recipes import RANKING_TOKENS, Forget, OneIn, Recipe, Swap, Train, describe
from convert.stages import align, uses_bfloat16
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


def refusals(config: PreTrainedConfig, recipe: Recipe) -> tuple[str, ...]:
    """Everything about this teacher and recipe that cannot work, each in a sentence."""
    found = []
    host = config.host_config() if config.model_type == "converted" else config
    if reason := refusal(host):
        return (reason,)
    latent = config.model_type == "converted" and any(mixer and mixer["name"] == "mla" for mixer in config.mixers)
    if latent:
        found.append("Latent attention is where a conversion ends: no other mixer can start from it. Take the run's own teacher.")
    if config.model_type == "converted" and config.keeps_attention and len({m["name"] for m in config.mixers if m}) > 1:
        found.append("A teacher's converted layers must share one mixer; this one has several.")
    for step in recipe.steps:
        if isinstance(step, Swap):
            found += _bad_keep(step, host.num_hidden_layers)
        if not isinstance(step, Train):
            continue
        s = step.settings
        if s.seq_len > host.max_position_embeddings:
            found.append(
                f"Step {step.name}: sequences must fit the teacher's {host.max_position_embeddings:,} positions; got --seq-len {s.seq_len:,}. Give a smaller one."
            )
        if s.seq_len < 2 or s.batch_tokens < s.seq_len or s.batch_tokens % s.seq_len:
            found.append(
                f"Step {step.name}: a batch must be whole sequences; {s.batch_tokens:,} tokens are not a multiple of --seq-len {s.seq_len:,}. Set --batch-tokens."
            )
        if s.tokens < 1:
            found.append(f"Step {step.name}: every step needs tokens; it has {s.tokens}. Raise --tokens.")
        if isinstance(s.objective, Distill) != (step.stage is not align):
            found.append(
                f"Step {step.name}: {step.stage.__name__} compares {'layers' if step.stage is align else 'distributions'}; its objective cannot be {_objective(step)}."
            )
    for step in recipe.steps:
        found += _out_of_bounds(step)
    return tuple(found + _bad_sequence(recipe))


def _bad_sequence(recipe: Recipe) -> list[str]:
    """What is wrong between steps."""
    swaps, found = [step for step in recipe.steps if isinstance(step, Swap)], []
    longest = max((step.settings.seq_len for step in recipe.steps if isinstance(step, Train)), default=0)
    for before, after in zip(swaps, swaps[1:], strict=False):
        if before.keep != after.keep or (isinstance(before.keep, OneIn) and before.keep.measured):
            found.append(
                f"Step {after.name}: it must replace the layers that step {before.name} did; give both the same keep, by name or by pattern."
            )
    for step in swaps:
        window = getattr(step.options, "window", None)
        if window is not None and window >= longest and not step.exact:
            found.append(
                f"Step {step.name}: a window must be shorter than the training sequences, or its end is never seen; it is {window:,}, they are "
                f"{longest:,}. Lower window, or raise --seq-len."
            )
    return found


def _bad_keep(step: Swap, num_layers: int) -> list[str]:
    keep = step.keep
    if isinstance(keep, OneIn):
        if keep.measured and step.exact:
            return [
                f"Step {step.name}: an exact edit costs nothing in any layer, so there is nothing to rank. Set keep to layers or to none."
            ]
        if keep.every < 2 or (keep.measured and keep.every > num_layers):
            return [f"Step {step.name}: of {num_layers} layers one in 2 .. {num_layers} can be kept; got one in {keep.every}. Set keep."]
    elif not all(0 <= i < num_layers for i in keep) or len(set(keep)) == num_layers:
        got = ", ".join(map(str, keep))
        return [f"Step {step.name}: kept layers must be within 0 .. {num_layers - 1}, and not be all of them; got {got}. Set keep."]
    return []


BOUNDS = {  # field -> lowest, highest; of settings, objectives, mixer options and steps alike
    "lr": (0, 10), "warmup": (0, 1), "decay": (0, 1), "floor": (0, 1), "clip": (0, 1e9), "seed": (0, 2**63 - 1), "beta1": (0, 0.9999),
    "beta2": (0, 0.999999), "weight_decay": (0, 1), "noise": (0, 1), "loss_chunk": (1, 1e9), "evaluate_every": (0, 1e18), "save_every": (0, 1e12),
    "micro_tokens": (1, 1e9), "temperature": (0.01, 100), "cross_entropy": (0, 1e6), "forward_kl": (0, 1e6), "reverse_kl": (0, 1e6),
    "rate": (0, 10), "conv": (1, 64), "dt_rank": (1, 65_536),
    "window": (1, 1e7), "sinks": (0, 65_536), "gate_bias": (-10, 10), "calibration": (0, 1e9),
    "kv_rank": (1, 1e6), "q_rank": (1, 1e6), "rope_dim": (2, 1e4), "cache_budget": (0.001, 1), "feature_matching": (0, 1e3),
}  # fmt: skip
CHOICES = {
    "schedule": ("wsd", "cosine"), "precision": ("auto", "float32", "bfloat16"), "gate": ("element", "head", "none"),
    "shape": ("exact", "native"), "start": ("calibrated", "svd", "random"),
}  # fmt: skip


def _out_of_bounds(step) -> list[str]:
    homes = [step]
    if isinstance(step, Train):
        homes += [step.settings, step.settings.objective]
    if isinstance(step, Swap):
        homes.append(step.options)
    found = []
    for home in filter(dataclasses.is_dataclass, homes):
        for field in (f.name for f in dataclasses.fields(home)):
            value, (low, high), choices = getattr(home, field), BOUNDS.get(field, (0, 0)), CHOICES.get(field, ())
            if field in BOUNDS and isinstance(value, int | float) and not low <= value <= high:
                found.append(f"Step {step.name}: {field} must be within {low:g} .. {high:g}; got {value:g}.")
            if choices and value not in choices:
                found.append(f"Step {step.name}: {field} must be one of {', '.join(choices)}; got {value!r}.")
    if isinstance(homes[-1], Distill) and not (homes[-1].cross_entropy or homes[-1].forward_kl or homes[-1].reverse_kl):
        found.append(f"Step {step.name}: a loss needs a term; all three weights are 0.")
    return found


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
                student = swap(
                    student, step.mixer, step.options, step.edited(num_layers), [SEEN] * num_layers if step.looks_first else None
                )
            except UserError as error:
                return Plan(teacher, recipe.target, data, device, 0, 0, (), 0, (), (f"Step {step.name}: {error}",))
            rows.append(_swap_plan(step, student, num_teacher, flops, num_layers, recipe))
        elif isinstance(step, Forget):
            rows.append(StepPlan(step.name, f"decay rate {step.rate:g}", 0, 0, _count(student), 0, 0.0))
        else:
            rows.append(_train_plan(step, student, num_teacher, flops, device))
            biggest = max(biggest, rows[-1].trainable)
    num_student = _count(student)
    exports = 2 if any(isinstance(step, Swap) and step.mixer == "mla" for step in recipe.steps) else 1  # model/, and native/
    disk = 3 * 12 * biggest + 2 * 4 * num_student + exports * 4 * num_student
    assumptions = (
        f"{str(dtype).removeprefix('torch.')} matrix products at {flops / 1e9:,.0f} GFLOP/s (measured on this {device} now), {MATMUL_SHARE:.0%} of it in training",
        "memory: float32 teacher and student, gradients and two Adam moments of what is trained, activations of one micro-batch",
        "disk: three checkpoints of the largest step (the third while it is written), two students, the exports; held-out measurements and data come on top of the time",
    )
    if _state_updates(student):
        assumptions += (
            f"scans with a decay per state at {_scan_rate(device) / 1e6:,.0f} M state updates/s, forward and backward (measured now)",
        )
    names = {mixer["name"] for mixer in config.mixers if mixer} - {"linear"} if config.model_type == "converted" else ()
    if names:
        assumptions += (
            f"of the teacher's {', '.join(sorted(names))} only projections and feature maps are kept: its convolution, Delta, decay and gate start anew",
        )
    return Plan(teacher, recipe.target, data, device, num_teacher, num_student, tuple(rows), disk, assumptions, ())


def _swap_plan(step: Swap, student: ConvertedForCausalLM, num_teacher: int, flops: float, num_layers: int, recipe: Recipe) -> StepPlan:
    """What a look at the layers' inputs, and a ranking, take: two moments of each layer's inputs are held, and attention over one text."""
    config, total = student.host.config, _count(student)
    looks = step.calibration if step.looks_first else 0
    ranks = RANKING_TOKENS * num_layers / 2 if isinstance(step.keep, OneIn) and step.keep.measured else 0
    longest = max(s.settings.seq_len for s in recipe.steps if isinstance(s, Train))
    held = 4 * (2 * num_layers * config.hidden_size**2 + 4 * longest**2) if looks else 0
    peak = 4 * (num_teacher + total) + held if looks or ranks else 0
    return StepPlan(step.name, _what(step, num_layers), 0, 0, total, peak, (looks + ranks) * 2 * num_teacher / (flops * MATMUL_SHARE))


def _what(step: Swap, num_layers: int) -> str:
    kept = num_layers - len(step.edited(num_layers))
    by = ", by measurement" if isinstance(step.keep, OneIn) and step.keep.measured else ""
    return (
        f"swap in {step.mixer}" + (f", keep {kept} of {num_layers} layers{by}" if kept else "") + (", must be exact" if step.exact else "")
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
    what = f"{step.stage.__name__}: {_objective(step)}, trains {s.trains.__name__}"
    return StepPlan(
        step.name, what, s.tokens, trainable, total - trainable, 4 * (num_teacher + total + 3 * trainable) + activations + logits, seconds
    )


def _objective(step: Train) -> str:
    plain = describe(step)["settings"]["objective"]
    if isinstance(plain, str):
        return plain
    terms = [f"{value:g} {key}" for key, value in plain.items() if value and key != "temperature"]
    return " + ".join(terms) + (f" (T = {plain['temperature']:g})" if plain["temperature"] != 1 else "")


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product."""
    n = 512 if device == "cpu" else 4096
    a = torch.randn(n, n, device=device, dtype=dtype)
    return _best(lambda: (a @ a)[0, 0].item(), 2 * n**3)


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
    return _best(lambda: selective_scan(u, delta, -A, B, B).sum().backward(), u.numel() * 64)


def _best(call, work: float) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return work / min(times)


def check_space(plan: Plan, folder: Path) -> str | None:
    """A sentence if the disk of `folder` has less room than the run needs, beside what it has written already."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = plan.disk_bytes - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if free < needed and not (folder / "report.json").exists():
        return f"The run needs about {size(needed)} more on disk; {there} has {size(free)} free. Free some, or give --out elsewhere."
    return None


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: float) -> str:
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def show(plan: Plan, console: Console) -> None:
    """The table a person reads before starting."""
    console.print(f"[bold]{escape(plan.teacher)}[/] -> [bold]{plan.target}[/]   data {escape(plan.data)}, device {plan.device}")
    for reason in plan.refusals:
        console.print(f"[red]refused:[/] {escape(reason)}")
    if plan.refusals:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "what", "tokens", "trained", "frozen", "peak memory", "time"):
        table.add_column(column, justify="left" if column in ("step", "what") else "right")
    for row in plan.steps:
        looks = [size(row.peak_bytes), duration(row.seconds)] if row.seconds else ["", ""]
        trains = [count(row.tokens), count(row.trainable), count(row.frozen), size(row.peak_bytes), duration(row.seconds)]
        table.add_row(row.name, row.what, *(trains if row.tokens else ["", "", count(row.frozen), *looks]))
    console.print(table, soft_wrap=False)
    total = sum(row.seconds for row in plan.steps)
    console.print(
        f"teacher {count(plan.parameters_teacher)} parameters, student {count(plan.parameters_student)}; about {duration(total)} of training, {size(plan.disk_bytes)} of disk"
    )
    for line in plan.assumptions:
        console.print(f"[dim]assumes {line}[/]")


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken, of the device's memory or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return physical_memory()
