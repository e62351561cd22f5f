"""Files of JSON objects, one a line, that grow: metrics.jsonl, generations.jsonl, answers.jsonl.

A power cut can leave the last line half written, or bytes of nothing: that line is dropped, and a message says so when
the file is written again. Damage anywhere else is refused with the file and the line."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from convert.core.errors import UserError
from convert.core.files import parse_json


def read(file: Path) -> list[dict]:
    """All rows of the file, but for a last line that was cut short; no rows where there is no file."""
    return [row for _, row in _scan(file)[0]]


def mend(file: Path) -> None:
    """Make the file ready for more rows: a last line that was cut short is removed, and a message says so."""
    if not file.exists():
        return
    rows, sound = _scan(file)
    size = file.stat().st_size
    with file.open("r+b") as out:
        if size > sound:
            print(f"{file}: line {len(rows) + 1} was cut short, as by a power cut; it is dropped.")
            out.truncate(sound)
        if sound:
            out.seek(sound - 1)
            if out.read(1) != b"\n":
                out.write(b"\n")
        os.fsync(out.fileno())


def append(file: Path, rows: Iterable[dict]) -> None:
    """Append all of these rows or, where the disk is full, none."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    with file.open("ab", buffering=0) as out:
        before = out.tell()
        try:
            while data:
                data = data[out.write(data) :]
        except OSError:
            out.truncate(before)
            raise


def keep(file: Path, wanted: Callable[[dict], bool]) -> None:
    """Keep the rows that are wanted, as they were written; the file changes at once or not at all."""
    if not file.exists():
        return
    aside = file.with_name(file.name + ".writing")
    with aside.open("wb") as out:
        out.writelines(line + b"\n" for line, row in _scan(file)[0] if wanted(row))
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)


def _scan(file: Path) -> tuple[list[tuple[bytes, dict]], int]:
    """The lines that hold a row, with it, and the number of bytes that are sound."""
    content = file.read_bytes() if file.exists() else b""
    rows, start, number = [], 0, 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        line, number = content[start:end], number + 1
        if line.strip():
            try:
                rows.append((line, _row(line, f"Line {number} of {file}")))
            except UserError as error:
                if not content[end:].strip(b"\0\r\n \t"):  # nothing follows: a power cut
                    return rows, start
                raise UserError(f"{error} Put back a copy of the file, or take that line out.") from None
        start = end + 1
    return rows, len(content)


def _row(line: bytes, where: str) -> dict:
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object.")
    return row
