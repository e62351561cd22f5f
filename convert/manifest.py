"""What was written, as hashes beside it: a bit that flips on a disk, or in a copy, is named where the file is read.

RUN/sha256.json has the exports and what a page is made of; convert/sha256.json has the embedded teacher. A folder that is copied away
without it loads as before. Of a file that grows (.jsonl) the part that was complete is known.

    python -m convert.manifest convert nano        # after the embedded teacher changed
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.errors import UserError
from convert.files import parse_json, sealed, sha256, unsealed, write_json

NAME = "sha256.json"
AGAIN = "Repeat the run's convert.run command, which writes it again"
WAYS_OUT = {  # how a file can be had again
    "metrics.jsonl": "Put back a copy, or start again with --fresh",
    "generations.jsonl": "Put back a copy, or start again with --fresh",
    "answers.jsonl": "Remove it: the questions are asked again",
    "evaluation.json": "Remove it, and evaluate again",
    "context.json": "Remove it, and measure again with experiments.context",
    "nano": "Install the project again",
}


def record(folder: Path, *names: str) -> None:
    """Know these files as they are now; a folder stands for all files in it, and what is not there is known no more."""
    entries = _without(_read(folder), names)
    for name in names:
        place = folder / name
        for file in sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place] if place.exists() else []:
            entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(folder / NAME, sealed({"files": entries}))


@contextmanager
def renewing(folder: Path, *names: str) -> Iterator[None]:
    """While these files are written they are unknown: killed in between, none is called damaged."""
    before = _read(folder)
    if before != (left := _without(before, names)):
        write_json(folder / NAME, sealed({"files": left}))
    yield
    record(folder, *names)


def check(folder: Path, *names: str) -> None:
    """Refuses the first of these files, or of those in these folders, that is not what was written."""
    for name, known in _read(folder).items():
        file = folder / name
        if not any(name == wanted or name.startswith(f"{wanted}/") for wanted in names) or not file.exists():
            continue
        size, grows = file.stat().st_size, file.suffix == ".jsonl"
        right = size >= known["bytes"] if grows else size == known["bytes"]
        if not right or sha256(file, known["bytes"] if grows else None) != known["sha256"]:
            way_out = WAYS_OUT.get(name) or WAYS_OUT.get(name.split("/")[0]) or AGAIN
            raise UserError(f"{file} is not what was written: its hash in {folder / NAME} is another one. {way_out}.")


def check_model(folder: Path) -> None:
    """A model's folder, by the hashes beside it, if there are any."""
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
        return {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"The hashes in {file} are damaged, so nothing beside them can be checked. Remove that file if you trust the others."
        ) from None


def _without(entries: dict[str, dict], names: tuple[str, ...]) -> dict[str, dict]:
    return {name: entry for name, entry in entries.items() if not any(name == n or name.startswith(f"{n}/") for n in names)}


if __name__ == "__main__":
    record(Path(sys.argv[1]), *sys.argv[2:])
