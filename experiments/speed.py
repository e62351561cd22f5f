"""How fast do the stages train with the compiled kernels and without, and where does the time go?

    python -m experiments.speed                       # neox-nano, every target, both stages
    python -m experiments.speed --profile mamba       # one step of both stages of one target, by operator

On a GPU where there is one. "Without" is the same stage on the scans' PyTorch operators, which was all there was before
the kernels."""

import argparse
import copy
import dataclasses
import time

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from convert import load_teacher, recipes
from convert.cli import whole_number
from convert.core.console import Console
from convert.data.batches import Batches
from convert.data.text import corpus, tokenize
from convert.models.loading import read_config, resolve
from convert.models.student import swap
from convert.recipes.base import Train
from convert.run import fail_in_words
from convert.training import loop as stages
from kernels import chunk_scan, selective_scan
from kernels.machine import DEVICE

KERNELS = "triton" if DEVICE == "cuda" else "cpu"  # the implementation that is measured
TARGETS = ("linear", "mamba", "mamba2")
KINDS = {  # words in an operator's name; the first that fit
    "scan (ours)": (
        "workbench",
        "forward_kernel",
        "backward_kernel",
        "carry_kernel",
        "outputs_kernel",
        "gradient_kernel",
    ),
    "matrix products": ("mm", "linear", "matmul"),
    "attention (teacher)": ("scaled_dot", "attention"),
    "convolution": ("conv",),
    "optimizer": ("_adam", "clip", "norm_out", "foreach_norm"),
    "softmax and losses": ("softmax", "logsumexp"),
    "copies and casts": ("copy", "cat", "clone", "contiguous", "index"),
    "elementwise": ("",),
}


class Clock(stages.Silent):
    """Keeps when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        """Called after each step."""
        wait()
        self.ends.append(time.perf_counter())


def wait() -> None:
    """Wait until the device has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def prepare(name: str, target: str, stage: str) -> tuple[PreTrainedModel, PreTrainedModel, Batches, stages.Settings]:
    """The teacher, the student that the recipe has in this stage (linear attention in align), batches and settings of
    the stage."""
    teacher = load_teacher(name, device=DEVICE)
    budget = recipes.budget(name, read_config(resolve(name)))
    settings = next(
        s.settings for s in recipes.to_linear(budget).steps if isinstance(s, Train) and s.stage.__name__ == stage
    )
    student = swap(copy.deepcopy(teacher.model), "linear")
    if target != "linear" and stage == "distill":
        student = swap(student, target)
    text = tokenize(corpus("stdlib"), teacher.tokenizer)
    return (
        teacher.model,
        student,
        Batches(text.train, settings.seq_len, settings.num_sequences, settings.seed),
        settings,
    )


def steps_of(
    stage: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Batches,
    settings: stages.Settings,
    steps: int,
) -> list[float]:
    """Seconds of each step but the first."""
    clock = Clock()
    one = dataclasses.replace(settings, tokens=steps * settings.batch_tokens, evaluate_every=0, save_every=1e9)
    stages.STAGES[stage](student, teacher, batches, one, track=clock)
    return [b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True)]


def speeds(name: str, steps: int) -> Table:
    """Table of training speeds with the kernels and with PyTorch operators."""
    table = Table(
        "target",
        "stage",
        "kernels, tokens/s",
        "PyTorch operators, tokens/s",
        "ratio",
        title=f"{name}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else f'{torch.get_num_threads()} threads'}",
    )
    compiled = {module: module.WAYS[KERNELS] for module in (chunk_scan, selective_scan)}
    for target in TARGETS:
        for stage in stages.STAGES:
            found = []
            for use in (True, False):
                for module, way in compiled.items():
                    module.WAYS[KERNELS] = way if use else (lambda device, dtype: "it is left out of this measurement")
                teacher, student, batches, settings = prepare(name, target, stage)
                seconds = sorted(
                    steps_of(stage, teacher, student, batches, settings, steps if use or target != "mamba" else 3)
                )
                found.append(settings.batch_tokens / seconds[len(seconds) // 2])
            table.add_row(target, stage, *(f"{speed:,.0f}" for speed in found), f"{found[0] / found[1]:.1f}")
    for module, way in compiled.items():
        module.WAYS[KERNELS] = way
    return table


def where(name: str, target: str, steps: int = 5) -> list[Table]:
    """Share of a stage's time by kind of operator; time outside of operators is Python and the loop."""
    tables = []
    for stage in stages.STAGES:
        teacher, student, batches, settings = prepare(name, target, stage)
        steps_of(stage, teacher, student, batches, settings, 3)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
        with profile(activities=kinds) as seen:
            start = time.perf_counter()
            steps_of(stage, teacher, student, batches, settings, steps)
            wait()
            total = time.perf_counter() - start
        sums = dict.fromkeys(KINDS, 0.0)
        for event in seen.key_averages():
            kind = next(kind for kind, words in KINDS.items() if any(word in event.key for word in words))
            sums[kind] += (event.self_device_time_total if DEVICE == "cuda" else event.self_cpu_time_total) / 1e6
        table = Table(
            "kind",
            "share",
            "ms a step",
            title=f"{name} to {target}, {stage}: {total / steps * 1e3:.0f} ms a step under the profiler",
        )
        for kind, seconds in sorted(sums.items(), key=lambda item: -item[1]):
            table.add_row(kind, f"{seconds / total:.1%}", f"{seconds / steps * 1e3:.1f}")
        table.add_row(
            "the rest: Python",
            f"{1 - sum(sums.values()) / total:.1%}",
            f"{(total - sum(sums.values())) / steps * 1e3:.1f}",
        )
        tables.append(table)
    return tables


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--steps", type=whole_number(1, 100_000), default=8)
    parser.add_argument("--profile", choices=TARGETS, help="where the time goes, instead of how fast")
    args = parser.parse_args()
    for table in where(args.teacher, args.profile) if args.profile else [speeds(args.teacher, args.steps)]:
        Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
