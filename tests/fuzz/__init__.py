"""Inputs that nobody would give on purpose. A command answers each with exit code 0 or 2, never 1 and never a
traceback, and loses nothing.

In the suite every test takes the same few examples each time; `make fuzz` takes others, and FUZZ times as many."""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ", 0))  # as many examples as in the suite, and other ones each time


class Reached(Exception):
    """What is stubbed was reached: the input was accepted."""


def fuzz(examples: int, **strategies) -> Callable:
    """A test over so many examples of these."""
    how = settings(
        max_examples=examples * (TIMES or 1), derandomize=not TIMES, deadline=None, database=None, print_blob=True,
        phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: how(given(**strategies)(test))


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
    assert code in (0, 2) and "defect of ours" not in said and "Traceback" not in said, (
        f"exit code {code}: {said[-1000:]}"
    )
    return code, said


def contents(folder: Path) -> dict[str, str]:
    """Of every file: to see that nothing was lost."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


NUMBERS = st.sampled_from(
    [
        "0",
        "1",
        "2",
        "7",
        "64",
        "-1",
        "-0",
        "1.5",
        "1e3",
        "1e30",
        "1e400",
        "-1e400",
        "nan",
        "inf",
        "-inf",
        str(2**63),
        str(2**70),
        str(-(2**70)),
        "9" * 5000,
        "0x10",
        "1_000",
        "٣",
        " 3",
        "3 ",
        "",
        " ",
        "1e-400",
        "0.0",
        "true",
        "none",
        "None",
        "1,2",
        ",",
        "1:2",
    ]
)
WORDS = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "a\0b",
        "\udcff",
        "x\ud800",
        "a" * 5000,
        "=",
        ".",
        "..",
        "/",
        "//",
        "-",
        "--",
        "~",
        "~nobody-at-all/x",
        "\n",
        "[bold]x[/]",
        "[/]",
        "%s%n",
        "$x",
        "{}",
        "é",
        "漢字",
        "\u202e",
        "🦀",
        "../../evil",
        "neox-nano",
        "stdlib",
        "hub:",
        "hub:x",
        "a/b",
        "cpu",
        "auto",
        "cuda",
        "cuda:99",
        "mps",
        "x.gguf",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "all",
        "names",
        "names,keys",
        "<script>",
    ]
)
SEED = st.integers(0, 2**32)
TEXTS = st.one_of(NUMBERS, WORDS, st.text(max_size=20))
LEAVES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    10**9,
    2**63,
    2**70,
    -(2**70),
    0.5,
    -0.5,
    1e400,
    float("nan"),
    "",
    "x",
    "2",
    "\ud800",
    "\0",
    "a" * 5000,
    "default",
    "converted",
    "evil/evil",
    [],
    {},
    [0],
    ["x"],
    {"a": 1},
    {"content": 5},
    {"type": "yarn"},
    [[]],
    [None],
)
MORE = ("auto_map", "attn_implementation", "num_labels", "to_dict", "__class__", "", "x", "per_layer_config")


def mutated(content, seed: int):
    """A JSON value with one to three of its nodes replaced, removed or doubled."""
    rng, content = random.Random(seed), json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        content = _mutate(rng, content)
    return content


def _mutate(rng: random.Random, node):
    if not isinstance(node, dict | list) or not node or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(LEAVES))
    how, keys = (
        rng.choice(("in", "in", "in", "drop", "add")),
        list(range(len(node))) if isinstance(node, list) else sorted(node),
    )
    key, node = rng.choice(keys), copy.deepcopy(node)
    if how == "in":
        node[key] = _mutate(rng, node[key])
    elif how == "drop":
        del node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[rng.choice(MORE)] = copy.deepcopy(rng.choice(LEAVES))
    return node


def damaged(good: bytes, seed: int) -> bytes:
    """The bytes of a file that was cut, overwritten or replaced."""
    rng = random.Random(seed)
    at = rng.randrange(len(good) + 1)
    return rng.choice(
        [
            good[:at],
            good[:at] + rng.randbytes(rng.randint(1, 8)) + good[at:],
            good[:at] + good[at + rng.randint(1, 8) :],
            good + good,
            rng.randbytes(200),
            b"",
            b"\xef\xbb\xbf" + good,
            b"\xff\xfe",
            b"[" * 100_000,
            b"null",
            b"\0" * 1000,
            good.replace(b"\n", b"\r\n"),
            good.replace(b'"', b"'"),
        ]
    )
