"""What is kept of one step of a run, and the request to stop.

RUN/steps/2-distill/checkpoint-40/   an unfinished step (parts.py); the last two are kept
RUN/steps/2-distill/student/         the finished step's weights
RUN/steps/2-distill/DONE             its result; written last, so its existence means that the rest is whole

DONE knows its own hash (`sealed`) and those of the student's files; a checkpoint has those of its files in
sha256.json. Where several processes train, all of them save and load, and the first keeps the folder.
"""

import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, sync, unsealed, write_json
from convert.core.processes import on_first, rank
from convert.runs.parts import files_named, load_parts, save_parts

KEPT_CHECKPOINTS = 2
TOGETHER = 1.0  # seconds (ours)
DIGESTS = "sha256.json"
LOGS = ("metrics.jsonl", "generations.jsonl")  # of the steps
UNREADABLE = (
    OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, pickle.PickleError,
)  # fmt: skip
NOT_WRITTEN = "No checkpoint could be written to"
GO_ON = "Free some space; the same command goes on from the last one."

Model = TypeVar("Model")


class StopRequest:
    """A request to stop at the next step, which Ctrl-C and SIGTERM make while it is open; a second one stops at
    once. Signals that come together are one request: who stops torchrun's group of processes reaches each process, and
    torchrun tells it to them again."""

    def __init__(self) -> None:
        self.requested = False
        self.since: float | None = None  # the first signal

    def __enter__(self) -> "StopRequest":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, self.requested = time.monotonic(), True
        if self.since is None:
            self.since = now
        elif now > self.since + TOGETHER:
            signal.default_int_handler(number, frame)


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
        """Have `write` fill a folder with the student, which all processes do together; then write DONE; the
        checkpoints can go after that. Returns the result as a later process reads it."""
        aside = self.folder / "student.writing"
        try:
            on_first(self._make_room_for_student, aside)
            write(aside)
        except OSError as error:
            if rank() == 0:
                _remove(aside)
            raise UserError(f"{NOT_WRITTEN} {self.folder} ({error}). {GO_ON}") from error
        return on_first(self._finished, aside, result)

    def _make_room_for_student(self, aside: Path) -> None:
        _remove(aside)
        _remove(self.folder / "student")
        aside.mkdir(parents=True)

    def _finished(self, aside: Path, result: dict[str, Any]) -> dict[str, Any]:
        for file in aside.iterdir():
            sync(file)
        digests = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        aside.rename(self.folder / "student")
        self._log_is_on_disk()
        manifest.record(self.run, *LOGS)
        write_json(self.folder / "DONE", sealed(result | {"sha256": digests}))
        self.tidy()
        return self.result() or {}

    def tidy(self) -> None:
        """Remove the checkpoints of a finished step, also of one that was killed before they went."""
        for checkpoint in self._checkpoints():
            _remove(checkpoint)

    def drop_weights(self) -> None:
        """A later step has its own."""
        shutil.rmtree(self.folder / "student", ignore_errors=True)

    def student(self, read: Callable[[Path], Model]) -> Model:
        """Return what `read` makes of the finished step's student."""
        done = on_first(self._done) or {}  # damage to it is a sentence of its own
        try:
            on_first(self._check_student, done)
            return read(self.folder / "student")
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"The weights of {self.folder} are damaged ({error}). Start again with --fresh; the old run is moved"
                " aside."
            ) from error

    def _check_student(self, done: dict) -> None:
        for name, digest in done["sha256"].items():
            if sha256(self.folder / "student" / name) != digest:
                raise ValueError(f"{name} is not what was written")

    # --- an unfinished step: what a stage's loop calls

    def load(self, like: Mapping[str, Tensor] | None = None) -> dict | None:
        """The newest sound checkpoint, in the computer's memory wherever it was written; of parameters that are shared
        out as `like`, by name, this process's rows."""
        found = on_first(self._newest)
        if found is None:
            return None
        try:
            return load_parts(found, like)
        except UNREADABLE as error:
            raise UserError(
                f"The checkpoint {found} is what was written and cannot be read here ({error}). "
                "Take the version of torch that wrote it, or remove the folder: the step then starts again."
            ) from error

    def _newest(self) -> Path | None:
        """The newest checkpoint whose files are what was written; those that are not are set aside."""
        for checkpoint in reversed(self._checkpoints()):
            if _is_sound(checkpoint):
                return checkpoint
            shutil.rmtree(damaged := checkpoint.with_name(f"{checkpoint.name}.damaged"), ignore_errors=True)
            checkpoint.rename(damaged)
            print(
                f"The checkpoint {checkpoint} is damaged; it was set aside; the one before it is used, or the step"
                " starts again."
            )
        if old := next(iter(sorted(self.folder.glob("checkpoint-*[0-9].pt"))), None):
            raise UserError(
                f"Checkpoints are folders, and {old} is a file of an earlier version of this package. Finish the step"
                " with that version, or delete the file: the step then starts again."
            )
        return None

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint aside, note the hashes of its files, and give it its name."""
        aside = self.folder / "checkpoint.writing"
        on_first(self._make_room, aside)
        try:
            save_parts(aside, state)
            on_first(self._publish, aside, step)
        except (OSError, RuntimeError) as error:
            if rank() == 0:  # where it fails on one process, the others may be elsewhere
                _remove(aside)
            raise UserError(f"{NOT_WRITTEN} {self.folder} ({error}). {GO_ON}") from error

    def _make_room(self, aside: Path) -> None:
        self._log_is_on_disk()
        _remove(aside)
        aside.mkdir(parents=True)

    def _publish(self, aside: Path, step: int) -> None:
        if missing := files_named(aside) - {file.name for file in aside.iterdir()}:
            raise UserError(
                f"The run's folder must be one that all processes share; the first does not see {sorted(missing)[0]} in"
                f" {aside}, which another wrote. Give an --out on a shared disk."
            )
        write_json(aside / DIGESTS, {file.name: sha256(file) for file in sorted(aside.iterdir())})
        aside.replace(self.folder / f"checkpoint-{step}")
        for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            _remove(old)

    def _log_is_on_disk(self) -> None:
        """A power cut takes no line of a step that stays: what a checkpoint goes on from was logged."""
        for name in LOGS:
            sync(self.run / name)

    def stop_requested(self) -> bool:
        return self.stop is not None and self.stop.requested

    def _checkpoints(self) -> list[Path]:
        found = (path for path in self.folder.glob("checkpoint-*[0-9]") if path.is_dir())
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _is_sound(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint are what was written, all of them."""
    try:
        digests = parse_json((checkpoint / DIGESTS).read_bytes(), "")
        return bool(digests) and all(sha256(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, UserError, AttributeError, TypeError):
        return False


def _remove(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True)
