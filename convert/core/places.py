"""The folders that are used: what the user names, the cache, and places for what other libraries would otherwise leave
in the home folder."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from convert.core.errors import UserError
from convert.core.fields import Place, require

OURS = "conversion-workbench"


def path_of(text: str | Path, what: str) -> Path:
    """The path that a user gave; `what` names it in an error."""
    require(Place, text, what)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{what} is {str(text)!r}, and this user has no such home folder. Write the path in full."
        ) from None


def cache_folder() -> Path:
    """The cache: CONVERT_CACHE, or a folder in the user's caches, or, for a user without a home, one among the
    temporary files that nobody else can write into."""
    if given := os.environ.get("CONVERT_CACHE"):
        return path_of(given, "CONVERT_CACHE")
    if given := os.environ.get("XDG_CACHE_HOME"):
        return path_of(given, "XDG_CACHE_HOME") / OURS
    try:
        return Path.home() / ".cache" / OURS
    except RuntimeError:  # no HOME, and no entry for this user
        return _private(Path(tempfile.gettempdir()) / f"{OURS}-{os.getuid()}")


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise UserError(
            f"The cache {folder} must belong to this user alone, and does not. Set CONVERT_CACHE to a folder of yours."
        )
    return folder


def keep_libraries_inside() -> None:
    """Send what matplotlib, W&B and torch's compilers keep into our cache, unless the user has said where. This runs
    when the package is imported, which is no place to complain of a wrong cache: commands do that, and whatever uses
    it."""
    try:
        cache = cache_folder()
    except (UserError, OSError):
        return
    inside = {
        "MPLCONFIGDIR": "matplotlib", "WANDB_CACHE_DIR": "wandb", "WANDB_DATA_DIR": "wandb-data",
        "TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton",
    }  # fmt: skip
    for variable, name in inside.items():
        if not os.environ.get(variable):
            os.environ[variable] = str(cache / name)


def refuse_overlap(out: Path, kept: Iterable[tuple[str, Path]]) -> None:
    """Raises UserError where the run's folder `out` is, holds, or lies inside what is only read, because that folder is
    written into and may be moved aside (--fresh). `kept`: what each thing is called, and where it is. Files are told
    apart by their inodes, so links and other ways to write a path are followed."""
    above_out, itself = _chain(out), _identity(out)
    for what, path in kept:
        if (identity := _identity(path)) is None:
            continue
        relation = (
            "is"
            if identity == itself
            else "lies inside"
            if identity in above_out
            else "holds"
            if itself and itself in _chain(path)
            else None
        )
        if relation:
            raise UserError(
                f"--out must be apart from what a run reads; {out} {relation} the {what} {path}. Give another --out."
            )


def _chain(path: Path) -> set[tuple[int, int]]:
    """The identities of this place and of all folders above it, as far as they exist."""
    path = path.resolve()
    return {found for place in (path, *path.parents) if (found := _identity(place))}


def _identity(path: Path) -> tuple[int, int] | None:
    """The device and inode of a file, None where there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # gone, or no path at all
        return None
    return found.st_dev, found.st_ino
