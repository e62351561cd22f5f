"""The cache of compiled libraries; it loads one only if no other user could have written it and no bit has changed.

Beside each library is a file with the SHA-256 of its content. Both files and their folder must belong to the current
user or to root, and only their owner may write to them; links are not followed.
"""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """Return the folder of compiled libraries.

    It is CONVERT_KERNELS, else `kernels` in CONVERT_CACHE, else in conversion-workbench of XDG_CACHE_HOME or ~/.cache.
    A user without a home gets a private folder in the system's temporary one.
    """
    if folder := os.environ.get("CONVERT_KERNELS"):
        return _expand_home(folder)
    if folder := os.environ.get("CONVERT_CACHE"):
        return _expand_home(folder) / "kernels"
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return _expand_home(folder) / "conversion-workbench" / "kernels"
    try:
        return Path.home() / ".cache" / "conversion-workbench" / "kernels"
    except RuntimeError:  # there is no HOME, and no entry in the list of users
        return _temporary_folder() / "kernels"


def _expand_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such home: creating the folder will say so
        return Path(path).absolute()


def make_folder(folder: Path) -> str | None:
    """Make the folder of compiled libraries if it is missing.

    Return None, or the end of a sentence that says why it cannot be made or why its content cannot be trusted.
    """
    try:
        if folder.parent == _temporary_folder():  # any user could have made a folder of this name
            folder.parent.mkdir(mode=0o700, exist_ok=True)
            if reason := why_not_private(folder.parent):
                return f"{folder.parent} {reason}; delete it, or set CONVERT_KERNELS to a folder of your own"
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if reason := why_not_private(folder.resolve()):
            return f"{folder} {reason}; set CONVERT_KERNELS to a folder of your own"
    except OSError as error:
        return f"the compiled library cannot be kept ({error})"
    return None


def remove_write_access(folder: Path) -> bool:
    """Remove other users' right to write to our folder; return whether they had it, so its content is untrusted."""
    status = folder.stat()
    if os.name != "posix" or status.st_uid != os.geteuid() or not status.st_mode & WRITABLE_BY_OTHERS:
        return False
    folder.chmod(stat.S_IMODE(status.st_mode) & ~WRITABLE_BY_OTHERS)
    return True


def why_untrusted(library: Path) -> str | None:
    """Return why a library must not be loaded, as the end of a sentence, or None if it may."""
    digest_file = _digest_file(library)
    for file in (library, digest_file):
        if not os.path.lexists(file):
            return f"has no {file.name} beside it" if file == digest_file else "is not there"
        if reason := why_not_private(file):
            return reason if file == library else f"has a {file.name} that {reason}"
    if _digest(library) != digest_file.read_text(encoding="ascii", errors="replace").strip():
        return f"is damaged: its content is not what {digest_file.name} says"
    return None


def install(built: Path, library: Path) -> None:
    """Move a library from beside its place into it, with its digest; each file appears whole or not at all."""
    digest_file = built.with_name(_digest_file(built).name)
    digest_file.write_text(_digest(built), encoding="ascii")
    for file, mode, destination in ((digest_file, 0o644, _digest_file(library)), (built, 0o755, library)):
        file.chmod(mode)  # independent of the umask
        with file.open("rb") as written:
            os.fsync(written.fileno())
        file.replace(destination)


def why_not_private(path: Path) -> str | None:
    """Return why another user could have written this file or folder, as a sentence's end, or None if none could."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return "is neither a file nor a folder"
    if os.name != "posix":
        return None
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user (number {status.st_uid})"
    return "may be written by other users" if status.st_mode & WRITABLE_BY_OTHERS else None


def _temporary_folder() -> Path:
    user = os.getuid() if os.name == "posix" else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"conversion-workbench-{user}"


def _digest_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
