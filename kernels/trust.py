"""Where compiled kernels are kept, and which of them are loaded: none that another user could have written, none whose bits have changed.

Beside each library is the SHA-256 of its content. Both files and their folder must belong to who runs this, or to root, and only
their owner may write to them; a link is never followed.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache() -> Path:
    """CONVERT_KERNELS, else `kernels` in CONVERT_CACHE, in conversion-workbench of XDG_CACHE_HOME or ~/.cache, or, for a user without a
    home, in a folder of theirs among the temporary ones."""
    if own := os.environ.get("CONVERT_KERNELS"):
        return _written(own)
    if base := os.environ.get("CONVERT_CACHE"):
        return _written(base) / "kernels"
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return _written(caches) / "conversion-workbench" / "kernels"
    try:
        return Path.home() / ".cache" / "conversion-workbench" / "kernels"
    except RuntimeError:  # no HOME, and no entry in the list of users
        return _temporary() / "kernels"


def _written(path: str) -> Path:
    """As a user wrote it, with `~` for a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such home: the folder that is then asked for says so
        return Path(path).absolute()


def why_no_folder(folder: Path) -> str | None:
    """Makes a folder for libraries; a sentence's end if there can be none, or if what is in it cannot be trusted."""
    try:
        if folder.parent == _temporary():  # anybody could have made one of this name
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            if reason := why_not_ours(folder.parent):
                return f"{folder.parent} {reason}; delete it, or set CONVERT_KERNELS to a folder of your own"
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if reason := why_not_ours(folder.resolve()):
            return f"{folder} {reason}; set CONVERT_KERNELS to a folder of your own"
    except OSError as error:
        return f"the compiled library cannot be kept ({error})"


def close_to_others(folder: Path) -> bool:
    """Takes away the right of others to write to our folder; whether they had it, so that what is in it cannot be trusted."""
    found = folder.stat()
    if os.name != "posix" or found.st_uid != os.geteuid() or not found.st_mode & OTHERS:
        return False
    folder.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
    return True


def why_not_sound(library: Path) -> str | None:
    """Why a library must not be loaded; None if it may."""
    record = _record(library)
    for file in (library, record):
        if not os.path.lexists(file):
            return f"has no {file.name} beside it" if file == record else "is not there"
        if reason := why_not_ours(file):
            return reason if file == library else f"has a {file.name} that {reason}"
    if _digest(library) != record.read_text(encoding="ascii", errors="replace").strip():
        return f"is damaged: its content is not what {record.name} says"
    return None


def keep(built: Path, library: Path) -> None:
    """Puts a library that was built beside its place into it, and its digest beside it. Each is written whole or not at all."""
    record = built.with_name(_record(built).name)
    record.write_text(_digest(built), encoding="ascii")
    for file, mode, place in ((record, 0o644, _record(library)), (built, 0o755, library)):
        file.chmod(mode)  # whatever the umask is
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(place)


def why_not_ours(path: Path) -> str | None:
    """Why another user could have written this file or folder, or the end of a sentence about what it is instead."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return "is neither a file nor a folder"
    if os.name != "posix":
        return None
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {found.st_uid})"
    return "may be written by other users" if found.st_mode & OTHERS else None


def _temporary() -> Path:
    number = os.getuid() if os.name == "posix" else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"conversion-workbench-{number}"


def _record(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
