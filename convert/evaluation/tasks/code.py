"""Tasks from files of Python's standard library that no training here has seen: predict a name, closing brackets, the
next line's indentation. Their training prompts come from the files that training sees.

Prompts end with a word and answers begin with a space, a bracket or a line break: no tokenizer joins the two.
"""

import functools
import io
import keyword
import random
import re
import tokenize
from bisect import bisect_left
from collections.abc import Callable

from convert.data.corpus import corpus, is_held_out
from convert.evaluation.tasks.base import Item, Task, ranked

CONTEXT = 800  # characters, of whole lines
CLOSING = re.compile(r"[)\]}]+")
NAME = re.compile(r"\s*([A-Za-z_]\w*)")
INDENT = re.compile(r"[ \t]*\n+( *)\S")


@functools.cache
def unseen() -> tuple[tuple[str, str], ...]:
    """(path, text) of the held-out files that are long enough to ask about."""
    return _files(held_out=True)


@functools.cache
def _files(held_out: bool) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, text)
        for key, text in corpus("stdlib").documents()
        if is_held_out(key) == held_out and len(text) > 3 * CONTEXT
    )


def _seen(kind: str, place: re.Pattern) -> Callable[[int, int], list[str]]:
    """Make training prompts: what stands before such a place of a file that is not held out. A prompt that a held-out
    file has too (a licence) is none."""

    def prompts(count: int, seed: int) -> list[str]:
        rng, held_out = random.Random(f"training {kind} {seed}"), "\0".join(text for _, text in unseen())
        found: dict[str, None] = {}
        for _ in range(20 * count):
            if len(found) == count:
                break
            _, text = rng.choice(_files(held_out=False))
            match = place.search(text, rng.randrange(CONTEXT, len(text)))
            if match and (prompt := _before(text, match.start())) not in held_out:
                found[prompt] = None
        return list(found)

    return prompts


def _before(text: str, at: int) -> str:
    """The context of a place: the whole lines within the last 800 characters, and the line so far."""
    start = text.find("\n", max(0, at - CONTEXT)) + 1
    return text[min(start, at) : at]


@functools.cache
def _tokens(text: str) -> tuple[tuple[int, str, int, int], ...]:
    """(type, text, start, end) of Python's tokens, by characters."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return tuple(
        (t.type, t.string, starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1]) for t in found
    )


def _is_name(kind: int, text: str) -> bool:
    return kind == tokenize.NAME and len(text) >= 4 and not keyword.iskeyword(text)


def _names(count: int, seed: int) -> list[Item]:
    """Ask for a name that the context has; the wrong choices are other names in it."""
    rng, found = random.Random(f"names {seed}"), []
    for _, text in unseen():
        tokens = _tokens(text)
        starts = [start for _, _, start, _ in tokens]
        for kind, name, at, _ in tokens:
            if at < CONTEXT or not _is_name(kind, name) or text[at - 1] != " " or text[at - 2] in " \n":
                continue
            prompt = _before(text, at - 1)
            inside = tokens[bisect_left(starts, at - len(prompt)) : bisect_left(starts, at)]
            near = {t for k, t, _, _ in inside if _is_name(k, t)}
            others = sorted(other for other in near if not other.startswith(name) and not name.startswith(other))
            if name in near and len(others) >= 3:
                found.append((prompt, name, others))
    items = []
    for number, (prompt, name, others) in enumerate(rng.sample(found, min(count, len(found)))):
        wrong = _apart(rng.sample(others, len(others)))
        if len(wrong) >= 3:
            choices, gold = ranked(rng, " " + name, [" " + other for other in wrong])
            items.append(Item(number, prompt, name, choices, gold))
    return items


def _apart(names: list[str]) -> list[str]:
    """The names but for those that begin with, or begin, one before them."""
    kept: list[str] = []
    for name in names:
        if not any(name.startswith(other) or other.startswith(name) for other in kept):
            kept.append(name)
    return kept


def _brackets(count: int, seed: int) -> list[Item]:
    """Ask for all brackets, two or more, that must be closed before the line ends."""
    rng, found = random.Random(f"brackets {seed}"), []
    for _, text in unseen():
        ends = {start for kind, _, start, _ in _tokens(text) if kind == tokenize.OP}
        for match in re.finditer(r"(?<=\w)[)\]}]{2,}(?=\n)", text):
            if match.start() > CONTEXT and all(i in ends for i in range(*match.span())):
                found.append((_before(text, match.start()), match[0]))
    items = []
    for number, (prompt, right) in enumerate(rng.sample(found, min(count, len(found)))):
        other = right[:-1] + ("]" if right[-1] == ")" else ")")
        wrong = [right[:-1], right + ")", other]
        choices, gold = ranked(rng, right + "\n", [w + "\n" for w in wrong])
        items.append(Item(number, prompt, right, choices, gold))
    return items


def _closing(text: str) -> str | None:
    return match[0] if (match := CLOSING.match(text.lstrip())) else None


def _indentation(count: int, seed: int) -> list[Item]:
    """Ask how far the next line is indented; the wrong choices are the same line, indented otherwise."""
    rng, found = random.Random(f"indentation {seed}"), []
    for _, text in unseen():
        kinds = {start: kind for kind, _, start, _ in _tokens(text)}
        for match in re.finditer(r"(?<=\w)\n( *)(\w+)", text):
            if match.start() > CONTEXT and len(match[1]) in (4, 8, 12) and kinds.get(match.start(2)) == tokenize.NAME:
                found.append((_before(text, match.start()), len(match[1]), match[2]))
    items = []
    for number, (prompt, width, word) in enumerate(rng.sample(found, min(count, len(found)))):
        lines = {w: "\n" + " " * w + word for w in (0, 4, 8, 12, 16)}
        right = lines.pop(width)
        choices, gold = ranked(rng, right, rng.sample(list(lines.values()), 3))
        items.append(Item(number, prompt, str(width), choices, gold))
    return items


def _width(text: str) -> str | None:
    return str(len(match[1])) if (match := INDENT.match(text)) else None


def _first_name(text: str) -> str | None:
    return match[1] if (match := NAME.match(text)) else None


CODE = (
    Task(
        "names",
        "the name that comes next in an unseen file",
        _names,
        _first_name,
        12,
        training_prompts=_seen("names", re.compile(r"(?<=[^ \n]) (?=[A-Za-z_]\w{3})")),
    ),
    Task(
        "brackets",
        "all brackets that must be closed",
        _brackets,
        _closing,
        6,
        training_prompts=_seen("brackets", re.compile(r"(?<=\w)(?=[)\]}]{2,}\n)")),
    ),
    Task(
        "indentation",
        "how far the next line is indented",
        _indentation,
        _width,
        8,
        stop=(),
        training_prompts=_seen("indentation", re.compile(r"(?<=\w)(?=\n *\w)")),
    ),
)
