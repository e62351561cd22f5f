"""What is kept of one step of a run, and the request to stop.

RUN/steps/2-distill/checkpoint-40.pt   an unfinished step; the last two are kept
RUN/steps/2-distill/student/           the finished step's weights
RUN/steps/2-distill/DONE               its result; written last, so its existence means that the rest is whole

DONE knows its own hash (`sealed`) and those of the student's files.
"""

import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, sync, unsealed, write_json, write_text

KEPT_CHECKPOINTS = 2
LOGS = ("metrics.jsonl", "generations.jsonl")  # of the steps
NOT_WRITTEN = "No checkpoint could be written to"
GO_ON = "Free some space; the same command goes on from the last one."

Model = TypeVar("Model")


class StopRequest:
    """A request to stop at the next step, which Ctrl-C and SIGTERM make while it is open; a second one stops at
    once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)


class StepFolder:
    """What is kept of one step. Everything is written aside and renamed."""

    def __init__(self, run: Path, index: int, name: str, stop: StopRequest | None = None) -> None:
        self.folder, self.index = run / "steps" / f"{index}-{name}", index
        self.stop = stop

    # --- a finished step

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    def result(self) -> dict | None:
        done = self._done()
        return None if done is None else {key: value for key, value in done.items() if key != "sha256"}

    def _done(self) -> dict | None:
        """What DONE holds: the result, and the hashes of the student's files."""
        done = self.folder / "DONE"
        if not done.exists():
            return None
        try:
            return unsealed(parse_json(done.read_bytes(), str(done)))
        except ValueError:
            again = "Delete that file to do the step again, or start" if self._can_be_repeated() else "Start"
            raise UserError(
                f"The result {done} is damaged. {again} again with --fresh; the old run is moved aside."
            ) from None

    def _can_be_repeated(self) -> bool:
        """The first step starts from the teacher, another one from the weights of the step before, which a later step
        drops."""
        return self.index == 0 or any(self.folder.parent.glob(f"{self.index - 1}-*/student/model.safetensors"))

    def finish(self, write: Callable[[Path], None], result: dict[str, Any]) -> dict[str, Any]:
        """Have `write` fill a folder with the student, then write DONE; the checkpoints can go after that. Returns the
        result as a later process reads it."""
        weights = self.folder / "student"
        aside = self.folder / "student.writing"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(weights, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            write(aside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{NOT_WRITTEN} {self.folder} ({error}). {GO_ON}") from error
        for file in aside.iterdir():
            sync(file)
        digests = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        aside.rename(weights)
        self._log_is_on_disk()
        manifest.record(self.run, *LOGS)
        write_json(self.folder / "DONE", sealed(result | {"sha256": digests}))
        self.tidy()
        return self.result() or {}

    def tidy(self) -> None:
        """Remove the checkpoints of a finished step, also of one that was killed before they went."""
        for file in self._checkpoints():
            self._remove(file)

    def drop_weights(self) -> None:
        """A later step has its own."""
        shutil.rmtree(self.folder / "student", ignore_errors=True)

    def student(self, read: Callable[[Path], Model]) -> Model:
        """Return what `read` makes of the finished step's student."""
        done = self._done() or {}  # damage to it is a sentence of its own
        try:
            for name, digest in done["sha256"].items():
                if sha256(self.folder / "student" / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            return read(self.folder / "student")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"The weights of {self.folder} are damaged ({error}). Start again with --fresh; the old run is moved"
                " aside."
            ) from error

    # --- an unfinished step: what a stage's loop calls

    def load(self) -> dict | None:
        """The newest sound checkpoint, in the computer's memory wherever it was written."""
        for file in reversed(self._checkpoints()):
            digest = file.with_suffix(".sha256")
            if not digest.exists() or sha256(file) != digest.read_text(encoding="utf-8"):
                file.rename(file.with_suffix(".damaged"))
                print(
                    f"The checkpoint {file} is damaged; it was set aside; the one before it is used, or the step starts"
                    " again."
                )
                continue
            try:
                return torch.load(file, weights_only=True, map_location="cpu")
            except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
                raise UserError(
                    f"The checkpoint {file} is what was written and cannot be read here ({error}). "
                    "Take the version of torch that wrote it, or remove the file: the step then starts again."
                ) from error
        return None

    def save(self, step: int, state: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log_is_on_disk()
        aside = self.folder / "checkpoint.writing"
        try:
            with aside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            write_text(self.folder / f"checkpoint-{step}.sha256", sha256(aside))
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"{NOT_WRITTEN} {self.folder} ({error}). {GO_ON}") from error
        aside.replace(self.folder / f"checkpoint-{step}.pt")
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            self._remove(old)

    def _log_is_on_disk(self) -> None:
        """A power cut takes no line of a step that stays: what a checkpoint goes on from was logged."""
        for name in LOGS:
            sync(self.run / name)

    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop.requested

    def _remove(self, checkpoint: Path) -> None:
        checkpoint.unlink()
        checkpoint.with_suffix(".sha256").unlink(missing_ok=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*[0-9].pt"), key=lambda file: int(file.stem.split("-")[1]))
