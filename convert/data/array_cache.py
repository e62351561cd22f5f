"""Arrays that are made once for a key and kept in the cache, with their hashes."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, sha256, unsealed, write_text
from convert.core.places import cache_folder


def kept(kind: str, key: str, write: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The folder with the .npy files of this key, and what is known of them; `kind` is "tokens" or "images".

    Where there are none, `write(folder)` makes them and returns what is to be known. A damaged folder is set aside, and
    its arrays are made anew."""
    folder = cache_folder() / kind / key
    if folder.exists() and (damage := _damage(folder)):
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key}.damaged-"))
        folder.rename(aside)
        print(
            f"The {kind.removesuffix('s')} cache {folder} is damaged ({damage}); it was moved to {aside.name} and is"
            " rebuilt."
        )
    if not folder.exists():
        try:
            _write(folder, write)
        except OSError as error:
            raise UserError(
                f"The {kind} must be cached, and {folder.parent} cannot take them ({error}). Free some space, or set"
                " CONVERT_CACHE."
            ) from error
    return folder, json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def _write(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.writing-"))
    try:
        meta = write(aside)
        digests = {file.stem: sha256(file) for file in sorted(aside.glob("*.npy"))}
        write_text(aside / "meta.json", json.dumps(sealed(meta | {"sha256": digests})))
        if not folder.exists():  # another process may have finished first, with the same content
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _damage(folder: Path) -> str | None:
    try:
        meta = parse_json((folder / "meta.json").read_bytes(), "meta.json")
        if "check" not in meta:
            return "meta.json changed"
        digests = unsealed(meta)["sha256"]
        changed = [f"{name}.npy" for name, digest in digests.items() if sha256(folder / f"{name}.npy") != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed" if changed else None
