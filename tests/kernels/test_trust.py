"""A compiled library is loaded if its bits are those that were compiled, and nobody else could have written them."""

import ctypes
import os
import random
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels import cpp_build, trust
from tests.kernels.conftest import needs_compiler

SOURCE = 'extern "C" { int answer() { return 42; } }\n'
pytestmark = [needs_compiler, pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads a tiny library from an empty cache, as a new process would."""
    source = tmp_path / "code" / "tiny" / "tiny.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    monkeypatch.setenv("CONVERT_KERNELS", str(tmp_path / "cache"))

    def now():
        cpp_build.load_library.cache_clear()
        return cpp_build.load_library(source)

    yield now
    cpp_build.load_library.cache_clear()


@pytest.fixture
def kept(load, tmp_path) -> Path:
    assert load().answer() == 42
    return next((tmp_path / "cache").glob("*.so"))


def flip(file: Path, seed: int) -> None:
    """Flip one bit, in a new file because this process has the old one mapped."""
    content, rng = bytearray(file.read_bytes()), random.Random(seed)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    replace(file, bytes(content))


def replace(file: Path, content: bytes) -> None:
    mode = file.stat().st_mode
    file.unlink()
    file.write_bytes(content)
    file.chmod(mode)


def record(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def link(file: Path) -> None:
    other = file.with_name("other")
    file.rename(other)
    file.symlink_to(other)


DAMAGE = {
    **{f"bit {seed}": (lambda library, seed=seed: flip(library, seed), "is damaged") for seed in range(6)},
    "cut": (lambda library: replace(library, library.read_bytes()[:1000]), "is damaged"),
    "zeros": (lambda library: replace(library, bytes(library.stat().st_size)), "is damaged"),
    "empty": (lambda library: replace(library, b""), "is damaged"),
    "longer": (lambda library: replace(library, library.read_bytes() + b"\0"), "is damaged"),
    "bit of the digest": (lambda library: flip(record(library), 1), "is damaged"),
    "digest not text": (lambda library: replace(record(library), b"\xff\xfe\x00"), "is damaged"),
    "digest empty": (lambda library: replace(record(library), b""), "is damaged"),
    "digest missing": (lambda library: record(library).unlink(), "has no .*sha256 beside it"),
    "writable by a group": (lambda library: library.chmod(0o775), "may be written by other users"),
    "writable by all": (lambda library: library.chmod(0o757), "may be written by other users"),
    "digest writable by all": (
        lambda library: record(library).chmod(0o666),
        "sha256 that may be written by other users",
    ),
    "folder writable by all": (
        lambda library: library.parent.chmod(0o777),
        "was in a folder that other users could write to",
    ),
    "link": (link, "is neither a file nor a folder"),
    "link of the digest": (lambda library: link(record(library)), "sha256 that is neither a file nor a folder"),
    "broken link": (
        lambda library: (library.unlink(), library.symlink_to("nowhere")),
        "is neither a file nor a folder",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_library_made_again(load, kept, capfd, damage, words):
    damage(kept)
    assert load().answer() == 42
    printed = capfd.readouterr().err
    assert re.search(f"The compiled library {kept} .*{words}.*, so it is not used", printed), printed
    assert "Compiling tiny" in printed
    assert (
        trust.why_untrusted(kept) is None and stat.S_IMODE(kept.parent.stat().st_mode) & trust.WRITABLE_BY_OTHERS == 0
    )
    load()
    assert "Compiling" not in capfd.readouterr().err


def test_a_sound_library_is_used_again(load, kept, capfd):
    before = kept.stat()
    assert load().answer() == 42
    assert "Compiling" not in capfd.readouterr().err.replace("Compiling tiny", "", 1)  # the first time
    assert kept.stat() == before


def test_other_owners_are_not_trusted(load, kept, capfd, monkeypatch):
    """Another user does not own the folder, so nothing in it is loaded or replaced."""
    before = kept.read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(trust, "why_not_private", _as_if_nobody_were_root(trust.why_not_private))
    assert "belongs to another user" in load()
    assert kept.read_bytes() == before


def _as_if_nobody_were_root(check: Callable) -> Callable:
    return lambda path: (
        check(path)
        or (None if path.lstat().st_uid == os.geteuid() else f"belongs to another user (number {path.lstat().st_uid})")
    )


def test_a_folder_that_cannot_be_made_is_said(load, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "cannot be kept" in load()


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_only_read(load, kept, capfd):
    kept.parent.chmod(0o555)
    assert load().answer() == 42
    flip(kept, 0) if os.access(kept.parent, os.W_OK) else kept.chmod(0o777)
    assert "cannot be written" in load()
    kept.parent.chmod(0o755)


def test_modes_do_not_depend_on_the_umask(load, tmp_path):
    before = os.umask(0)
    try:
        assert load().answer() == 42
    finally:
        os.umask(before)
    for path in (tmp_path / "cache", *(tmp_path / "cache").iterdir()):
        assert not path.stat().st_mode & trust.WRITABLE_BY_OTHERS, path


def test_many_at_once_all_get_a_sound_one(tmp_path, monkeypatch):
    """Each compiles into a folder of its own, and any order of renames leaves a library with its digest."""
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    target, found = tmp_path / "cache" / "tiny.so", []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                cpp_build._load_or_build(target, lambda: cpp_build._compile("g++", tmp_path / "tiny.cpp", target))
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [isinstance(one, ctypes.CDLL) and one.answer() for one in found] == [42] * 4
    assert sorted(path.name for path in target.parent.iterdir()) == ["tiny.so", "tiny.so.sha256"]


def test_a_user_without_a_home_has_a_folder_among_the_temporary_ones(tmp_path):
    script = (
        "import pwd, os\ndef nobody(number): raise KeyError(number)\npwd.getpwuid = nobody\nfrom kernels import trust\n"
        "folder = trust.cache_folder()\n"
        "print(folder); print(trust.make_folder(folder)); print(oct(folder.parent.stat().st_mode))"
    )
    names = ("HOME", "XDG_CACHE_HOME", "CONVERT_CACHE", "CONVERT_KERNELS")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.getcwd(),
    }

    def run(**more) -> list[str]:
        done = subprocess.run([sys.executable, "-c", script], env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")

    own = tmp_path / f"conversion-workbench-{os.getuid()}"
    assert run()[:3] == [str(own / "kernels"), "None", "0o40700"]
    own.chmod(0o777)  # as somebody else may have made it
    assert f"{own} may be written by other users; delete it, or set CONVERT_KERNELS" in run()[1]
    assert run(CONVERT_CACHE=str(tmp_path / "other"))[0] == str(tmp_path / "other" / "kernels")


def test_the_environment_decides_where(monkeypatch):
    for name, value, wanted in (
        ("CONVERT_KERNELS", "/a", "/a"),
        ("CONVERT_CACHE", "/b", "/b/kernels"),
        ("XDG_CACHE_HOME", "/c", "/c/conversion-workbench/kernels"),
        ("HOME", "/d", "/d/.cache/conversion-workbench/kernels"),
    ):
        with monkeypatch.context() as only:
            for other in ("CONVERT_KERNELS", "CONVERT_CACHE", "XDG_CACHE_HOME", "HOME"):
                only.delenv(other, raising=False)
            only.setenv(name, value)
            assert str(trust.cache_folder()) == wanted
    assert str(trust._temporary_folder()).startswith(tempfile.gettempdir())
