"""Writing files whole or not at all, in UTF-8 whatever the locale is, and reading JSON that a stranger wrote."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.core.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write the text to `path`, whole or not at all. Half surrogates (of a name that is not UTF-8) become escapes."""
    aside = path.with_name(path.name + ".writing")
    try:
        with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def parse_json(text: str | bytes, where: str, parse_int: Callable[[str], Any] = int) -> Any:
    """The value of a stranger's JSON. Raises UserError, with a message that begins with `where`, also where the text is
    nested too deeply or has numbers too long for Python. `parse_int` reads whole numbers."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, parse_int=parse_int)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # also of a number with thousands of digits, and of bytes that are not UTF-8
        reason = str(error).split(";")[0]
    raise UserError(f"{where} is not JSON: {reason}.")


def sha256(file: Path, size: int | None = None) -> str:
    """The SHA-256 hash of a file, or of its first `size` bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        if size is None:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256()
        while size > 0 and (block := opened.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
        return digest.hexdigest()


def sync(file: Path) -> None:
    """Wait until the file is on the disk, whatever happens to the machine afterwards."""
    if file.exists():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def sealed(content: dict) -> dict:
    """The content with a hash of itself in "check", so that a flipped bit shows in a file of numbers and names."""
    content = json.loads(json.dumps(content))
    return content | {"check": _seal(content)}


def unsealed(content: Any) -> dict:
    """The content that was sealed; raises ValueError where it changed since. Content that never was sealed passes."""
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    content = dict(content)
    if "check" in content and content.pop("check") != _seal(content):
        raise ValueError("it is not what was written")
    return content


def _seal(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
