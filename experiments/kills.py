"""Does a run of two processes survive kill -9 at any instant?

python -m experiments.kills               # 20 kills of a small conversion, a minute each
python -m experiments.kills --kills 4     # fewer

Each run is killed once: one of its processes gets SIGKILL while the run takes a training step, saves, evaluates or
exports, in turn, at an instant drawn from that phase's time in a run that nothing disturbed. The same command then goes
on. What it ends with must be that of the undisturbed run, bit for bit; every fourth goes on with one process or with
three, and must be as close as rounding allows. Lines that were logged before the last checkpoint must stay as they are:
they hold times, so a step that was done again would show.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from convert.cli import fail_in_words, whole_number
from convert.core.errors import UserError
from convert.core.files import sha256, write_text

STEPS = ("linear", "align", "distill")
SETTINGS = {  # eight steps of three sequences, a checkpoint after each
    "tokens": 1536, "batch_tokens": 192, "save_every": 0, "precision": "float32",
}  # fmt: skip
COMMAND = "-m convert.run neox-nano --to linear --tiny --tasks names --wandb disabled --device cpu".split()
KINDS = ("step", "save", "evaluate", "export")
LONGEST = 1200.0  # seconds of a command, after which it hangs, however busy the machine is
# what a clock decides, also how long the contexts are that are measured; and the hash over it
CLOCK = re.compile(r"seconds|_per_s$|^\.(contexts|cache_bytes)\.|\.check$")
CLOCKED = {"report.json", "metrics.jsonl", "DONE"}  # files in which clocks decide some numbers
UNCOMPARED = {"report.md", "report.html", "README.md", "sha256.json", "lock"}  # made of those, or of nothing
TOO_LATE, SHORTEST = "it ended before it could be killed", 0.01  # seconds into a phase, below which none is drawn again
ROUNDING = 1e-4  # of losses and norms, relative, after 16 steps of Adam


@dataclass(frozen=True)
class Instant:
    """So many seconds after a phase began for the n-th time (counted from 0)."""

    phase: str
    nth: int
    seconds: float


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=whole_number(1, 10_000), default=20)
    parser.add_argument("--seed", type=whole_number(0, 2**32), default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="a folder that does not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"--out must be a new folder; {args.out} exists. Give another --out.")
    straight = args.out / "straight"
    code, phases, said = watched(straight, 2)
    if code:
        raise UserError(f"The run that nothing disturbs ended with {code}; it said: {said[-2000:]}")
    lines = [
        "| process | killed in | for the nth time | seconds into it | went on with | result |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    for i, instant in enumerate(drawn(phases, args.kills, args.seed)):
        rank = i // len(KINDS) % 2
        size = (1, 3)[i // 4 % 2] if (i + i // 4) % 4 == 3 else 2
        run = args.out / f"{i}"
        while (faults := trial(straight, run, instant, rank, size)) == [TOO_LATE] and instant.seconds > SHORTEST:
            shutil.rmtree(run)  # the machine is faster now than it was in the run that nothing disturbed
            instant = replace(instant, seconds=instant.seconds / 2)
        equal = "equal bit for bit" if size == 2 else "equal to rounding"
        where = f"{rank} | {instant.phase} | {instant.nth + 1} | {instant.seconds:.2f} | {size}"
        lines.append(f"| {where} | {'; '.join(faults) or equal} |")
        print(lines[-1], flush=True)
        failed += bool(faults)
        if not faults:
            shutil.rmtree(run)
        write_text(args.out / "table.md", "\n".join(lines) + "\n")
    if failed:
        raise UserError(f"Every run must survive; {failed} of {args.kills} did not. Their folders are in {args.out}.")


def trial(straight: Path, run: Path, instant: Instant, rank: int, size: int) -> list[str]:
    """What is wrong after a run was killed at this instant and went on with so many processes."""
    code, phases, said = watched(run, 2, instant, rank)
    if code == 0:
        return [TOO_LATE]
    faults = [f"the other process said: {line}" for line in said.splitlines() if "defect of ours" in line]
    logged = lines_that_stay(run)
    code, _, said = watched(run, size)
    if code:
        return [*faults, f"the same command ended with {code}: {' '.join(said[-500:].split())}"]
    if (run / "metrics.jsonl").read_bytes()[: len(logged)] != logged:
        faults.append("steps before the last checkpoint were done again")
    return faults + (differences(straight, run) if size == 2 else beyond_rounding(straight, run))


# --- a run, and what it is doing


def watched(run: Path, size: int, instant: Instant | None = None, rank: int = 0) -> tuple[int, list[tuple], str]:
    """Run the command with so many processes, and kill the one of this rank at an instant. Returns the exit code, the
    phases that were seen with their seconds, and what was said."""
    settings = [f"{step}.{key}={value}" for step in STEPS[1:] for key, value in SETTINGS.items()]
    command = [*COMMAND, *(word for each in settings for word in ("--set", each)), "--out", str(run)]
    if size > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *command]
    said = run.with_name(f"{run.name}.log")
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open("ab") as file:
        began = file.tell()
        running = subprocess.Popen([sys.executable, *command], stdout=file, stderr=file)
        try:
            phases = _follow(run, running, instant, rank)
        finally:
            if running.poll() is None:
                running.terminate()  # torchrun ends its processes, too
                running.wait()
    return running.returncode, phases, said.read_bytes()[began:].decode(errors="replace")


def _follow(run: Path, running: subprocess.Popen, instant: Instant | None, rank: int) -> list[tuple[str, float]]:
    phases: list[tuple[str, float]] = []
    began = since = time.monotonic()
    while running.poll() is None:
        now, seconds = phase(run), time.monotonic() - since
        if not phases or now != phases[-1][0]:
            phases.append((now, 0.0))
            since, seconds = time.monotonic(), 0.0
        phases[-1] = (now, seconds)
        nth = sum(name == now for name, _ in phases) - 1
        if instant is not None and (now, nth) == (instant.phase, instant.nth) and seconds >= instant.seconds:
            os.kill(process_of(running.pid, rank), signal.SIGKILL)
            instant = None
        if time.monotonic() - began > LONGEST:
            raise UserError(f"A run takes a minute; {run} has not ended after {LONGEST:.0f} s. Look at {run}.log.")
        time.sleep(0.002)
    return phases


def process_of(torchrun: int, rank: int) -> int:
    """The process of this rank among those that torchrun started."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text(encoding="utf-8").split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise UserError(f"torchrun must have started a process of rank {rank}; process {torchrun} has none.")


def phase(run: Path) -> str:
    """What a run is doing, as its folder shows: start, a step's name, save of a step, evaluate, export, or end."""
    if not (run / "ledger.json").exists():
        return "start"
    if (run / "report.html").exists():
        return "end"
    if any((run / name).exists() for name in ("model.writing", "model")):
        return "export"
    for i, step in enumerate(STEPS):
        folder = run / "steps" / f"{i}-{step}"
        if not (folder / "DONE").exists():
            asides = ("checkpoint.writing", "student.writing", "student")
            return f"save of {step}" if any((folder / name).exists() for name in asides) else step
    return "evaluate"


def kind_of(name: str) -> str:
    """The kind of a phase: one of KINDS, or another word for what no run can lose."""
    return "step" if name in STEPS else "save" if name.startswith("save of ") else name


def drawn(phases: list[tuple[str, float]], kills: int, seed: int) -> Iterator[Instant]:
    """Instants of each kind in turn, each uniform over all the time that the phases of its kind took."""
    rng = np.random.default_rng(seed)
    entries = [(name, [p for p, _ in phases[:i]].count(name), s) for i, (name, s) in enumerate(phases)]
    for i in range(kills):
        left = [entry for entry in entries if kind_of(entry[0]) == KINDS[i % len(KINDS)]]
        at = rng.uniform(0, sum(seconds for *_, seconds in left))
        while at > left[0][-1] and len(left) > 1:
            at -= left.pop(0)[-1]
        yield Instant(left[0][0], left[0][1], at)


# --- what it ends with


def lines_that_stay(run: Path) -> bytes:
    """The log up to the last checkpoint, or finished step, of a run that was killed."""
    steps = dict.fromkeys(STEPS, 0)
    for i, step in enumerate(STEPS):
        folder = run / "steps" / f"{i}-{step}"
        saved = [int(file.name.split("-")[1]) for file in folder.glob("checkpoint-*[0-9]")]
        steps[step] = 10**9 if (folder / "DONE").exists() else max(saved, default=0)
    log = run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    kept = 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the kill came while it was written
            break
        if row["step"] > steps[row["stage"]]:
            break
        kept += len(line)
    return b"".join(lines)[:kept]


def differences(straight: Path, run: Path) -> list[str]:
    """The files of a run that are not those of the other: by their hash, or by all numbers but those of a clock."""
    files = [
        {str(file.relative_to(at)): file for file in at.rglob("*") if file.is_file() and file.name not in UNCOMPARED}
        for at in (straight, run)
    ]
    found = [f"{name} is in one of them alone" for name in sorted(files[0].keys() ^ files[1].keys())]
    for name in sorted(files[0].keys() & files[1].keys()):
        read = content if Path(name).name in CLOCKED else sha256
        if read(files[0][name]) != read(files[1][name]):
            found.append(f"{name} differs")
    return found


def beyond_rounding(straight: Path, run: Path) -> list[str]:
    """What differs between a run of two processes and one that went on with another number, by more than rounding."""
    found = []
    one, other = (content(at / "metrics.jsonl") for at in (straight, run))
    if one.keys() != other.keys():
        found.append("metrics.jsonl has other lines")
    far = [key for key in one.keys() & other.keys() if not _is_close(one[key], other[key])]
    found += [f"{far[0]} and {len(far) - 1} more of metrics.jsonl are {one[far[0]]} and {other[far[0]]}"] if far else []
    last = f"{len(STEPS) - 1}-{STEPS[-1]}"  # float32; what is exported is rounded to less
    weights = [load_file(at / "steps" / last / "student" / "model.safetensors") for at in (straight, run)]
    if weights[0].keys() != weights[1].keys():
        return [*found, "the model has other weights"]
    for name, value in weights[0].items():
        error = (weights[1][name].double() - value.double()).square().mean().sqrt()
        if error > ROUNDING * torch.clamp(value.double().square().mean().sqrt(), min=1e-3):
            found.append(f"{name} is off by {error:.1e}")
    return found


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= ROUNDING * max(abs(one), 1e-3)
    return bool(one == other)


def content(file: Path) -> dict[str, Any]:
    """The numbers and words of a file of JSON, or of lines of it, by their path; without those of a clock."""
    text = file.read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    return {path: value for path, value in _leaves(found) if not CLOCK.search(path)}


def _leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(found, (dict, list)):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from _leaves(value, f"{path}.{key}")
    else:
        yield path, found


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
