"""Recordings: what a teacher said of the tokens of a training step, on disk, for any number of students.

FOLDER/recording.json     of what it is: teacher, tokenizer, data, batches, and how much of each distribution is kept
FOLDER/parts/00000.npy    one record for each token with a target, batch after batch
FOLDER/parts/00000.json   the hash of that file, and how many records each of its batches has
FOLDER/DONE               the hashes of all parts; written last, so its existence means that the rest is whole

The JSON files know their own hashes (`sealed`). A part is the same whichever process writes it, and when.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, unsealed, write_json
from convert.data.batches import Batch

LAYOUT = 1
PART_TOKENS = 1 << 16  # of a part, about (ours)
MOST_PARTS = 10_000
AGAIN = "Repeat the convert.teach command that made it: it writes anew what is missing or damaged."
LOWEST = float(np.finfo(np.float16).min)  # of log p: a probability of nothing


def record_type(vocab_size: int, top_k: int, sample: int) -> np.dtype:
    """The record of one token: ids in the fewest bytes, logarithms of probabilities in float16."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<i4"
    fields: list[Any] = [("ids", ids, (top_k + sample,)), ("log_p", "<f2", (top_k + 1,))]
    return np.dtype(fields + [("negative_entropy", "<f4")] * bool(sample))


class Recording:
    """The writer of a folder. `about` is plain data: what the recording is of ("of", name -> fingerprint), which
    batches ("batches": `steps`, `batch_tokens` and others), and what is kept of each token ("kept": `vocab_size`,
    `top_k`, `sample`)."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, {"layout": LAYOUT} | dict(about)
        self.record = record_type(**about["kept"])

    def parts(self) -> list[range]:
        """The steps of each part."""
        batches = self.about["batches"]
        size = max(math.ceil(PART_TOKENS / batches["batch_tokens"]), math.ceil(batches["steps"] / MOST_PARTS))
        return [range(i, min(i + size, batches["steps"])) for i in range(0, batches["steps"], size)]

    def most_bytes(self) -> int:
        """The bytes of the whole recording where every token has a target."""
        batches = self.about["batches"]
        return batches["steps"] * batches["batch_tokens"] * self.record.itemsize

    def begin(self) -> None:
        """Make the folder, or go on with what is there. Raises UserError for a folder of something else."""
        self.check()
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        if not (description := self.folder / "recording.json").exists():
            write_json(description, sealed(self.about))

    def check(self) -> None:
        """Raise UserError for a folder of something else."""
        description, own = self.folder / "recording.json", {"lock", "parts", "recording.json.writing"}
        if not description.exists():
            is_folder = not self.folder.exists() or self.folder.is_dir()
            if not is_folder or any(file.name not in own for file in self.folder.glob("*")):
                raise UserError(f"A recording needs a folder of its own; {self.folder} is none. Give another --out.")
        elif differing := _differing(_read(description), self.about):
            raise UserError(
                f"{self.folder} is a recording of something else ({differing}). Give another --out, or remove that"
                " folder."
            )

    def is_whole(self, number: int) -> bool:
        """Whether a part is there, and what was written."""
        file = _part(self.folder, number)
        try:
            return sha256(file) == str(_read(file.with_suffix(".json"))["sha256"])
        except (OSError, UserError, KeyError):
            return False

    def write(self, number: int, batches: list[np.ndarray]) -> None:
        """Write a part: the records of each of its batches."""
        file = _part(self.folder, number)
        aside = file.with_name(f"{file.name}.writing-{os.getpid()}")
        try:
            with aside.open("wb") as opened:
                np.save(opened, np.concatenate(batches))
                opened.flush()
                os.fsync(opened.fileno())
            digest = sha256(aside)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
        write_json(file.with_suffix(".json"), sealed({"sha256": digest, "counts": [len(each) for each in batches]}))

    def finish(self) -> None:
        """Write DONE. Raises UserError where a part is missing that another process wrote."""
        parts = [_part(self.folder, i).with_suffix(".json") for i in range(len(self.parts()))]
        if missing := next((file for file in parts if not file.exists()), None):
            raise UserError(
                f"The processes of a recording write into one folder; the first does not see {missing}, which another"
                " wrote. Give an --out on a shared disk."
            )
        for left in (self.folder / "parts").glob("*.writing-*"):  # of a process that was killed
            left.unlink()
        write_json(self.folder / "DONE", sealed({"parts": [_read(file)["sha256"] for file in parts]}))


class Recorded:
    """The reader of a finished folder. Raises UserError where it is none, or is damaged; the hash of a part is looked
    at when its first batch is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "DONE").is_file():
            there = "is not finished" if (folder / "recording.json").exists() else "holds none"
            raise UserError(
                f"cache:FOLDER names a finished recording of a teacher; {folder} {there}. See convert.teach."
            )
        about, self.hashes = _read(folder / "recording.json"), _read(folder / "DONE").get("parts", [])
        if about.get("layout") != LAYOUT:
            raise UserError(
                f"{folder} was recorded by another version of this package. Record it anew with convert.teach."
            )
        self.about = about
        self.steps_of = Recording(folder, about).parts()
        self.has_draws = bool(about["kept"]["sample"])
        self._open: tuple[int, np.ndarray, list[int]] | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of all that is recorded."""
        return hashlib.sha256(json.dumps([self.about, self.hashes]).encode()).hexdigest()[:16]

    def check(self, part: str, wanted: Mapping[str, Any]) -> None:
        """Raises UserError where the recording is of other things: `part` of what it is about ("of", "batches",
        "kept") must be as `wanted`, but may have more `steps`."""
        known = self.about[part]
        has_enough = known.get("steps", 0) >= wanted.get("steps", 0)
        if differing := _differing(known, {k: v for k, v in wanted.items() if k != "steps" or not has_enough}):
            raise UserError(
                f"{self.folder} is a recording of something else ({differing}). Record this with convert.teach, into"
                " another folder."
            )

    def __call__(self, step: int, has_target: Tensor) -> tuple[Tensor, ...]:
        """What was recorded of the tokens of a step, [B, T, ...], zeros where they have no target [B, T]: the fields of
        a RecordedTeacher."""
        size = len(self.steps_of[0])
        number, place = step // size, step % size
        if self._open is None or self._open[0] != number:
            self._open = (number, *self._checked(number))
        _, records, counts = self._open
        start = sum(counts[:place])
        found = records[start : start + counts[place]]
        if len(found) != (wanted := int(has_target.sum())):
            raise UserError(
                f"{self.folder} has {len(found)} tokens of step {step}, and its batch has {wanted} targets: it was"
                " recorded of other data. Record this with convert.teach, into another folder."
            )
        tensors = []
        for name in found.dtype.names or ():
            values = torch.from_numpy(found[name].astype(np.int32) if name == "ids" else found[name].copy())
            spread = values.new_zeros(*has_target.shape, *values.shape[1:])
            spread[has_target] = values
            tensors.append(spread)
        return tuple(tensors)

    def _checked(self, number: int) -> tuple[np.ndarray, list[int]]:
        """The records of a part, and how many each of its batches has."""
        file = _part(self.folder, number)
        if not file.exists():
            raise UserError(f"The recording {self.folder} lacks its part {file.name}. {AGAIN}")
        if sha256(file) != self.hashes[number]:
            raise UserError(f"{file} is not what was written: its hash is another one. {AGAIN}")
        counts: list[int] = _read(file.with_suffix(".json"))["counts"]
        return np.load(file, mmap_mode="r"), counts


@dataclass(frozen=True)
class RecordedBatches:
    """`batches(step)`: the batch of one step, with what the teacher said of it."""

    batches: Callable[[int], Batch]
    recorded: Recorded

    def __call__(self, step: int) -> Batch:
        batch = self.batches(step)
        return replace(batch, recorded=self.recorded(step, batch.labels != -100))


def _part(folder: Path, number: int) -> Path:
    return folder / "parts" / f"{number:05}.npy"


def _read(file: Path) -> dict[str, Any]:
    """A sealed file. Raises UserError where it is damaged or gone."""
    try:
        found = parse_json(file.read_bytes(), str(file))
        found["check"]  # it was always sealed
        return unsealed(found)
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{file} is missing or damaged. {AGAIN}") from None


def _differing(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first difference between two descriptions in words; "" where they are the same."""
    for name in wanted:
        old, new = known.get(name), wanted[name]
        if isinstance(old, dict) and isinstance(new, dict):
            if found := _differing(old, new):
                return found
        elif old != new:
            return f"{name}: recorded {old}, now {new}"
    return ""
