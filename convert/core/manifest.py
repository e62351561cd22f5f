"""Hashes of what was written, in a file beside it: a bit that flips on a disk, or in a copy, is reported where the file
is read.

RUN/sha256.json has the hashes of the exports and of what a page is made from; convert/sha256.json has those of the
embedded teacher. A folder that is copied away without its hashes loads as before, and a whole folder may be gone; a
single file may not, unless removing it is the way to have it made again. A file that grows (.jsonl) is known by the
part that was complete. A model's card is for people to edit, and has no hash.

    python -m convert.core.manifest convert nano        # after the embedded teacher changed
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, unsealed, write_json

NAME = "sha256.json"
CARD = "README.md"
AGAIN = "Repeat the run's convert.run command, which writes it again"
REMOVE = "Remove it"
WAYS_OUT = {  # how a file can be had again
    "metrics.jsonl": "Put back a copy, or start again with --fresh",
    "generations.jsonl": "Put back a copy, or start again with --fresh",
    "answers.jsonl": f"{REMOVE}: the examples are evaluated again",
    "evaluation.json": f"{REMOVE}, and evaluate again",
    "context.json": f"{REMOVE}, and measure again with experiments.context",
    "similarity.json": f"{REMOVE}: the report is then without it",
    "nano": "Install the project again",
}


def record(folder: Path, *names: str) -> None:
    """Keep the hashes of these files as they are now. A folder stands for all files in it; what is gone loses its
    hash."""
    entries = _without(_read(folder), names)
    for name in names:
        place = folder / name
        for file in (
            sorted(f for f in place.rglob("*") if f.is_file() and f.name != CARD)
            if place.is_dir()
            else [place]
            if place.exists()
            else []
        ):
            entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(folder / NAME, sealed({"files": entries}))


@contextmanager
def renewing(folder: Path, *names: str) -> Iterator[None]:
    """Goes around the writing of these files, which have no hashes meanwhile: if the process is killed in between, none
    is called damaged."""
    before = _read(folder)
    if before != (left := _without(before, names)):
        write_json(folder / NAME, sealed({"files": left}))
    yield
    record(folder, *names)


def check(folder: Path, *names: str) -> None:
    """Raises UserError at the first of these files, or of those in these folders, that is not what was written, or is
    missing."""
    for name, known in _read(folder).items():
        top = name.split("/")[0]
        if not any(name == wanted or name.startswith(f"{wanted}/") for wanted in names):
            continue
        way_out = WAYS_OUT.get(name) or WAYS_OUT.get(top) or AGAIN
        if (folder / name).exists():
            reason = None if _is_right(folder / name, known) else f"its hash in {folder / NAME} is another one"
        else:
            whole_folder_gone = top != name and not (folder / top).exists()  # whoever loads it says so
            reason = (
                None
                if whole_folder_gone or way_out.startswith(REMOVE)
                else f"it is missing, and {folder / NAME} has its hash"
            )
        if reason:
            raise UserError(f"{folder / name} is not what was written: {reason}. {way_out}.")


def _is_right(file: Path, known: dict) -> bool:
    size, grows = file.stat().st_size, file.suffix == ".jsonl"
    right = size >= known["bytes"] if grows else size == known["bytes"]
    return right and sha256(file, known["bytes"] if grows else None) == known["sha256"]


def check_model(folder: Path) -> None:
    """Check a model's folder by the hashes beside it, if there are any; raises UserError as `check` does."""
    folder = folder.absolute()
    check(folder.parent, folder.name)


def _read(folder: Path) -> dict[str, dict]:
    file = folder / NAME
    if not file.exists():
        return {}
    try:
        found = parse_json(file.read_bytes(), str(file))
        found["check"]  # it was always sealed
        entries = unsealed(found)["files"]
        known = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in entries.items()
        }
        return {name: entry for name, entry in known.items() if Path(name).name != CARD}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"The hashes in {file} are damaged, so nothing beside them can be checked. Remove that file if you trust"
            " the others."
        ) from None


def _without(entries: dict[str, dict], names: tuple[str, ...]) -> dict[str, dict]:
    return {
        name: entry for name, entry in entries.items() if not any(name == n or name.startswith(f"{n}/") for n in names)
    }


if __name__ == "__main__":
    record(Path(sys.argv[1]), *sys.argv[2:])
