"""Paths that a user gives, the cache without a home, and a run's folder apart from what it reads."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from convert.core import places
from convert.core.errors import UserError
from convert.core.places import cache_folder, path_of, refuse_overlap
from kernels import trust

ROOT = Path(places.__file__).parents[2]


def test_paths_begin_at_home_and_hold_no_nul(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs/x", "--out") == tmp_path / "runs" / "x"
    for wrong in ("a\0b", "", "caf\udce9", "~nobody-of-that-name/x"):
        with pytest.raises(UserError, match="^--out "):
            path_of(wrong, "--out")


def test_the_cache_is_where_it_is_said_or_in_a_place_of_this_user_alone(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "CONVERT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    found = cache_folder()
    assert found.parent == tmp_path and stat.S_IMODE(found.stat().st_mode) == 0o700 and cache_folder() == found
    found.chmod(0o777)
    with pytest.raises(UserError, match="must belong to this user alone"):
        cache_folder()
    found.rename(tmp_path / "other")
    found.symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="must belong to this user alone"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache_folder() == Path("/there/conversion-workbench")
    monkeypatch.setenv("CONVERT_CACHE", "/here")
    assert cache_folder() == Path("/here")


WAYS = {  # out, as it is given -> the relation
    "teacher": "is",
    "./teacher/": "is",
    "x/../teacher": "is",
    "link": "is",
    "teacher/runs/new": "lies inside",
    "link/new": "lies inside",
    ".": "holds",
    "holder": "holds",
    "beside": None,
    "teacher-2": None,
    "beside/new/deep": None,
    "linked-file-holder": "holds",
}


@pytest.mark.parametrize("out, relation", WAYS.items())
def test_a_run_is_apart_from_what_it_reads_however_that_is_written(out, relation, tmp_path, monkeypatch):
    for name in ("teacher", "beside", "teacher-2", "x", "linked-file-holder"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("teacher")
    (tmp_path / "holder").symlink_to(".")
    (tmp_path / "linked-file-holder" / "blob").write_text("weights")
    (tmp_path / "teacher" / "weights").symlink_to(tmp_path / "linked-file-holder" / "blob")
    monkeypatch.chdir(tmp_path)
    kept = [("teacher", Path("teacher")), ("teacher", Path("teacher/weights")), ("data", Path("gone"))]
    if relation is None:
        return refuse_overlap(Path(out), kept)
    with pytest.raises(
        UserError,
        match=rf"^--out must be apart from what a run reads; .* {relation} the teacher .* Give another --out\.$",
    ):
        refuse_overlap(Path(out), kept)


def test_libraries_keep_what_they_keep_in_our_cache_unless_told_otherwise(tmp_path):
    script = (
        "import convert, os; print(os.environ['MPLCONFIGDIR'], os.environ['WANDB_CACHE_DIR'],"
        " os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    clean = {name: value for name, value in os.environ.items() if not name.endswith(("_DIR", "CONFIGDIR"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=clean | {"CONVERT_CACHE": str(tmp_path), "WANDB_CACHE_DIR": "/mine"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"{tmp_path}/matplotlib", "/mine", f"{tmp_path}/torchinductor"]


@pytest.mark.parametrize(
    "name, value",
    [("CONVERT_CACHE", "~/ours"), ("CONVERT_CACHE", "/ours"), ("XDG_CACHE_HOME", "~/all"), ("HOME", "/home/me")],
)
def test_compiled_kernels_are_kept_in_the_same_cache(name, value, monkeypatch):
    """kernels imports nothing of ours, so it knows the rule by itself."""
    for other in ("CONVERT_KERNELS", "CONVERT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert trust.cache_folder() == places.cache_folder() / "kernels" and "~" not in str(trust.cache_folder())


@pytest.mark.parametrize("cache", ["~nobody-of-that-name/x", "/" + "x" * 5000])
def test_a_cache_that_cannot_be_is_said_by_commands_and_not_by_imports(cache, tmp_path):
    def python(*words):
        return subprocess.run(
            [sys.executable, *words], env=os.environ | {"CONVERT_CACHE": cache, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert python("-c", "import convert").returncode == 0
    done = python("-m", "convert.run", "neox-nano", "--to", "linear", "--data", "stdlib", "--plan")
    assert done.returncode == 2 and done.stderr.startswith("error: CONVERT_CACHE ") and "Traceback" not in done.stderr
