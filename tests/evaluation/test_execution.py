"""Programs of models: what is right passes, and what would do harm is stopped."""

import os
import subprocess
import sys
import time

import pytest

from convert.core.errors import UserError
from convert.evaluation import execution
from convert.evaluation.execution import runs_through


@pytest.fixture
def outside(tmp_path):
    """A file that no program may touch, and a process that none may end."""
    file = tmp_path / "mine"
    file.write_text("kept")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield file, process
        assert process.poll() is None and file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]
        process.kill()


RIGHT = {
    "a function": "def add(a, b):\n    return a + b\nassert add(1, 2) == 3",
    "what solutions import": "import math, re, hashlib, collections, itertools, heapq, typing, random",
    "printing": "print('x' * 100_000)",
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(program):
    assert runs_through(program)


WRONG = {
    "an assertion": "assert 1 == 2",
    "no Python": "def f(:",
    "an exit": "raise SystemExit(0)",
    "an exit without ceremony": "import os; os._exit(0)",
    "no standard input": "assert input() is not None",
    "memory": "x = bytearray(1 << 31)",
    "growing memory": "x = []\nwhile True: x.append(bytes(1 << 24))",
    "recursion": "def f(): return f()\nf()",
    "half a surrogate": "x = '\ud800'; assert len(x) == 2",
}


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(program):
    assert not runs_through(program)


HARM = {
    "a file written": "open('{file}', 'w').write('x')",
    "a file read": "assert open('{file}').read()",
    "a file read by other means": "import os; os.read(os.open('{file}', os.O_RDONLY), 9)",
    "a file removed": "import os; os.remove('{file}')",
    "a folder removed": "import shutil; shutil.rmtree('{folder}')",
    "a new file": "import pathlib; pathlib.Path('{folder}/x').touch()",
    "a process ended": "import os; os.kill({pid}, 9)",
    "a group ended": "import os; os.killpg(os.getpgid({pid}), 9)",
    "a shell": "import os; os.system('rm {file}')",
    "a subprocess": "import subprocess; subprocess.run(['rm', '{file}'])",
    "a subprocess by other means": "import _posixsubprocess",
    "a fork": "import os\nos.fork()",
    "the network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "C": "import ctypes; ctypes.CDLL(None).unlink(b'{file}')",
    "more memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@pytest.mark.parametrize("protected", [True, False], ids=["with namespaces", "by the hook alone"])
def test_harm_is_refused(outside, protected, monkeypatch):
    if not protected:
        monkeypatch.setattr(execution, "_namespaces", lambda: ())
    file, process = outside
    for name, program in HARM.items():
        if protected and name not in ("a process ended", "the network"):
            continue  # both ways would take twice as long
        text = program.format(file=file, folder=file.parent, pid=process.pid)
        assert not runs_through(text), name
        caught = f"try:\n    {text.splitlines()[0]}\nexcept BaseException: pass" if "\n" not in text else text
        runs_through(caught)  # nothing happens where the refusal is caught either: see the fixture


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"], ids=["loop", "sleep"])
def test_what_does_not_end_is_ended(program):
    before = time.perf_counter()
    assert not runs_through(program, seconds=1, wall_seconds=3)
    assert time.perf_counter() - before < 20


def test_nothing_of_the_environment_is_told(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert runs_through("import os; assert 'SECRET_TOKEN' not in os.environ")
    assert runs_through("import os; assert os.listdir('.') == []")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="limits that Linux alone has"):
        runs_through("pass")
    assert os.name == "posix"
