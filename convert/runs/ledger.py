"""The ledger of a run: the settings that it was started with (RUN/ledger.json), and who may work on it.

The file knows its own hash (`sealed`). What is kept of each step is in checkpoint.py.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, unsealed, write_json
from convert.core.processes import gathered, is_restart, on_first, world

SEEN_WITHIN = 60.0  # seconds in which a shared disk shows on one machine what another wrote (ours)
LAYOUT = 2  # of a run's folder; another layout is not read


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the run folder to this process while it is open; the lock goes with the process, however that ends."""
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
    """Raise UserError unless a run may live in this folder, as far as the outside shows."""
    is_run = (folder / "ledger.json").exists()
    if file := next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None):
        raise UserError(f"--out must be a folder; {file} is a file. Give another --out.")
    if fresh and folder.exists() and not is_run:
        raise UserError(f"--fresh sets aside an old run; {folder} is not a run folder. Give another --out.")
    if folder.exists() and not is_run and any(p.name != "ledger.json.writing" for p in folder.iterdir()):
        raise UserError(f"--out must be a run folder or a new one; {folder} holds other files. Give another --out.")


def check_shared(folder: Path) -> None:
    """Raise UserError, in all processes of a run, unless each sees the folder that the first one opened."""
    if world() == 1:
        return
    wanted = on_first((folder / "ledger.json").read_bytes)
    if not all(gathered(_comes_to_hold(folder / "ledger.json", wanted))):
        raise UserError(
            f"The run's folder must be one that all processes share, and {folder} is not on every machine what it is on"
            " the first. Give an --out on a shared disk."
        )


def _comes_to_hold(file: Path, wanted: bytes) -> bool:
    """Whether a file has this content: at once, or when a disk of the network has told this machine of it."""
    until = time.monotonic() + SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if file.read_bytes() == wanted:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)


def open_run(folder: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Make the run folder, or check that it belongs to these settings. `fresh` sets an old run aside, once: a command
    that is started again by itself goes on."""
    check_out(folder, fresh)
    if fresh and is_restart():
        print(f"This command was started again by itself, so the run in {folder} goes on: --fresh counted before.")
        fresh = False
    settings = {"layout": LAYOUT} | settings
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
    if before.get("layout") != LAYOUT:
        raise UserError(
            f"A run goes on with the version that started it; {folder} is of another one. Start again with --fresh (the"
            " old run is moved aside) or another --out."
        )
    changes = [f"{key}: {old!r} -> {new!r}" for key, old, new in _differences(before, settings)]
    if changes:
        shown = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        raise UserError(
            f"{folder} was started with other settings ({shown}). Repeat them, or give --fresh or another --out."
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            name = a.get("name", i) if isinstance(a, dict) else i
            yield from _differences(a, b, f"{path}.{name}")
    elif old != new:
        yield path, old, new
