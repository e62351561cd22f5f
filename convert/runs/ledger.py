"""The ledger of a run: which steps are done, with which settings, and where an unfinished one goes on.

RUN/ledger.json                     the settings that the run was started with
RUN/steps/2-distill/checkpoint-40.pt   an unfinished step; the last two are kept
RUN/steps/2-distill/student/           the finished step's weights
RUN/steps/2-distill/DONE               its result; written last, so its existence means that the rest is whole

Both know their own hash (`sealed`), and DONE those of the student's files.
"""

import fcntl
import os
import pickle
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, sync, unsealed, write_json, write_text
from convert.models.config import ConvertedConfig
from convert.models.student import ConvertedForCausalLM

KEPT_CHECKPOINTS = 2
LOGS = ("metrics.jsonl", "generations.jsonl")  # of the steps
NOT_WRITTEN = "No checkpoint could be written to"
GO_ON = "Free some space; the same command goes on from the last one."


@contextmanager
def locked(folder: Path):
    """The run folder is this process's alone while it is open; the lock goes with the process, however that ends."""
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"One process at a time may work on a run; another one holds {folder}. Wait for it, or give another"
                " --out."
            ) from None
        yield


def check_out(folder: Path, fresh: bool) -> None:
    """Whether a run may live in this folder, from the outside."""
    is_run = (folder / "ledger.json").exists()
    if file := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise UserError(f"--out must be a folder; {file} is a file. Give another --out.")
    if fresh and folder.exists() and not is_run:
        raise UserError(f"--fresh sets aside an old run; {folder} is not a run folder. Give another --out.")
    if folder.exists() and not is_run and any(p.name != "ledger.json.writing" for p in folder.iterdir()):
        raise UserError(f"--out must be a run folder or a new one; {folder} holds other files. Give another --out.")


def open_run(folder: Path, settings: dict, fresh: bool) -> None:
    """Make the run folder, or check that it belongs to these settings. `fresh` sets an old run aside."""
    check_out(folder, fresh)
    ledger = folder / "ledger.json"
    if fresh and folder.exists():
        with locked(folder):
            pass
        aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
        folder.rename(aside)
        print(f"The old run was moved to {aside}.")
    if not ledger.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(ledger, sealed(settings))
        return
    try:
        before = unsealed(parse_json(ledger.read_bytes(), str(ledger)))
    except ValueError:
        raise UserError(
            f"The ledger {ledger} is damaged. Start again with --fresh (the old run is moved aside) or another --out."
        ) from None
    changes = [f"{key}: {old!r} -> {new!r}" for key, old, new in _differences(before, settings)]
    if changes:
        shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise UserError(
            f"{folder} was started with other settings ({shown}). Repeat them, or give --fresh or another --out."
        )


def _differences(old, new, path=""):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            name = a.get("name", i) if isinstance(a, dict) else i
            yield from _differences(a, b, f"{path}.{name}")
    elif old != new:
        yield path, old, new


class StopRequest:
    """While it is open, Ctrl-C and SIGTERM ask for a stop at the next step; a second one stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python takes handlers from no other
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.requested = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)


class StepFolder:
    """What is kept of one step. Everything is written aside and renamed."""

    def __init__(self, run: Path, index: int, name: str, stop: StopRequest | None = None):
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

    def finish(self, student: ConvertedForCausalLM, result: dict) -> dict:
        """Weights and configuration first, DONE last; then the checkpoints can go. The result as a later process reads
        it."""
        weights = self.folder / "student"
        aside = self.folder / "student.writing"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(weights, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            save_model(student, str(aside / "model.safetensors"))
            student.config.save_pretrained(aside)
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
        return self.result()

    def tidy(self) -> None:
        """Of a finished step no checkpoint is needed, also of one that was killed before they went."""
        for file in self._checkpoints():
            self._remove(file)

    def drop_weights(self) -> None:
        """A later step has its own."""
        shutil.rmtree(self.folder / "student", ignore_errors=True)

    def student(self, teacher) -> ConvertedForCausalLM:
        """The finished step's student, on the teacher's device."""
        done = self._done()
        try:
            known = done["sha256"]
            known = {"model.safetensors": known} if isinstance(known, str) else known  # of an earlier version
            for name, digest in known.items():
                if sha256(self.folder / "student" / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            config = ConvertedConfig.from_pretrained(self.folder / "student", local_files_only=True)
            config._attn_implementation = teacher.config._attn_implementation
            with torch.device(teacher.device):
                student = ConvertedForCausalLM(config)
            load_model(student, str(self.folder / "student" / "model.safetensors"))
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"The weights of {self.folder} are damaged ({error}). Start again with --fresh; the old run is moved"
                " aside."
            ) from error
        student.generation_config = teacher.generation_config
        return student.requires_grad_(False).eval()

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
