"""Inputs that nobody would give on purpose. A command answers each with exit code 0 or 2, never 1 and never a traceback, and loses nothing.

In the suite every test takes the same examples for a few seconds; `make fuzz` takes others for minutes (FUZZ_SECONDS, of each test)."""

import contextlib
import functools
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SUITE_SECONDS = 8
SECONDS = float(os.environ.get("FUZZ_SECONDS", SUITE_SECONDS))
LONG = "FUZZ_SECONDS" in os.environ


class Reached(Exception):
    """What is stubbed was reached: the input was accepted."""


def fuzz(**strategies) -> Callable:
    """A test over examples of these, until its time is over; what is drawn afterwards is not tried."""

    def wrap(test: Callable) -> Callable:
        ends = []

        @functools.wraps(test)
        def timed(*args, **kwargs):
            ends.append(time.monotonic() + SECONDS) if not ends else None
            if time.monotonic() < ends[0]:
                test(*args, **kwargs)

        return settings(
            max_examples=100_000 if LONG else 300, derandomize=not LONG, deadline=None, database=None, print_blob=True,
            phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
        )(given(**strategies)(timed))  # fmt: skip

    return wrap


def run_command(main: Callable, argv: list[str], program: str | None = None) -> tuple[int, str]:
    """Exit code and what was said on stderr, of a command in this process; `program`: where it reads sys.argv."""
    said, before = io.StringIO(), sys.argv
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            if program is not None:
                sys.argv = [program, *argv]
            code = main() if program is not None else main(argv)
        except SystemExit as stop:  # argparse
            code = stop.code or 0
        finally:
            sys.argv = before
    return code, said.getvalue()


def behaves(main: Callable, argv: list[str], program: str | None = None) -> tuple[int, str]:
    code, said = run_command(main, argv, program)
    if "Reached" in said:
        return 0, said
    assert code in (0, 2) and "defect of ours" not in said and "Traceback" not in said, f"exit code {code}: {said[-1000:]}"
    return code, said


def contents(folder: Path) -> dict[str, str]:
    """Of every file: to see that nothing was lost."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


NUMBERS = st.sampled_from([
    "0", "1", "2", "7", "64", "-1", "-0", "1.5", "1e3", "1e30", "1e400", "-1e400", "nan", "inf", "-inf", str(2**63), str(2**70), str(-(2**70)),
    "9" * 5000, "0x10", "1_000", "٣", " 3", "3 ", "", " ", "1e-400", "0.0", "true", "none", "None", "1,2", ",", "1:2",
])  # fmt: skip
WORDS = st.sampled_from([
    "", " ", "\0", "a\0b", "\udcff", "x\ud800", "a" * 5000, "=", ".", "..", "/", "//", "-", "--", "~", "~nobody-at-all/x", "\n", "[bold]x[/]",
    "[/]", "%s%n", "$x", "{}", "é", "漢字", "\u202e", "🦀", "../../evil", "neox-nano", "stdlib", "hub:", "hub:x", "a/b", "cpu", "auto", "cuda", "cuda:99",
    "mps", "x.gguf", "/dev/null", "/dev/zero", "/proc/self/mem", "all", "names", "names,keys", "<script>",
])  # fmt: skip
TEXTS = st.one_of(NUMBERS, WORDS, st.text(max_size=20))
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["", "x", "\ud800", "\0", "a" * 5000, "default", "converted"]),
        st.sampled_from([0, 1, -1, 2, 10**9, 1e400, float("nan"), 0.5]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "content", "id", "name", "type", "model_type"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated(draw, content):
    """A JSON value with one to three of its nodes replaced, removed or doubled."""
    content = draw(st.just(content).map(copy_of))
    for _ in range(draw(st.integers(1, 3))):
        content = _mutate(draw, content)
    return content


def copy_of(content):
    if isinstance(content, dict):
        return {key: copy_of(value) for key, value in content.items()}
    return [copy_of(value) for value in content] if isinstance(content, list) else content


def _mutate(draw, node):
    if not isinstance(node, dict | list) or not node or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    if isinstance(node, list):
        i = draw(st.integers(0, len(node) - 1))
        how = draw(st.sampled_from(["in", "in", "drop", "double"]))
        if how == "in":
            return [*node[:i], _mutate(draw, node[i]), *node[i + 1 :]]
        return node[:i] + node[i + 1 :] if how == "drop" else node + [node[i]]
    key = draw(st.sampled_from(sorted(node)))
    how = draw(st.sampled_from(["in", "in", "drop", "add"]))
    if how == "drop":
        return {k: v for k, v in node.items() if k != key}
    if how == "add":
        return node | {
            draw(st.sampled_from(["auto_map", "attn_implementation", "num_labels", "to_dict", "__class__", "", "x"])): draw(JSON)
        }
    return node | {key: _mutate(draw, node[key])}


def damaged(good: bytes):
    """Bytes of a file that was cut, overwritten or replaced."""
    return st.one_of(
        st.integers(0, len(good)).map(lambda n: good[:n]),
        st.tuples(st.integers(0, max(0, len(good) - 1)), st.binary(min_size=1, max_size=8)).map(
            lambda t: good[: t[0]] + t[1] + good[t[0] + len(t[1]) :]
        ),
        st.sampled_from(
            [b"", b"\xef\xbb\xbf" + good, good + good, b"\xff\xfe", b"[" * 100_000, b"null", b"\0" * 1000, good.replace(b"\n", b"\r\n")]
        ),
        st.binary(max_size=200),
    )
