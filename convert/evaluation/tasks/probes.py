"""Probes of recall at a length, as RULER has them (arXiv 2404.06654): several keys, several values of one key, and
chains of assignments; in Python, and in sentences for models that follow instructions.

An example is a function of its seed and number; both choose words at random, so other seeds give other examples.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from convert.evaluation.tasks.base import Item, Task, ranked
from convert.evaluation.tasks.chat import WORDS
from convert.evaluation.tasks.code import unseen
from convert.evaluation.tasks.recall import KNOWN, NEEDLE_LENGTHS

KEYS = 4  # RULER's multi-key task has four needles
VALUES = 3  # of one key (ours; RULER's has four)
HOPS = (1, 2, 4)  # assignments after the first; RULER tracks four
CHAINS = 2  # the one that is asked for, and another as long (ours; RULER's default is one)
ALONE = 2  # values that are assigned once, so that all choices are in the text (ours)
NAME = re.compile(r"\s*['\"]?([A-Za-z_]\w*)")
FIRST_WORD = re.compile(r"[\s#]*(\w+)")
ARGUMENT = re.compile(r"([A-Za-z_]\w*)\)")
DIGITS = re.compile(r"(?<!\d)\d{4}(?!\d)")
Facts = tuple[list[str], str, str, tuple[str, ...], int]  # lines to hide in order, question, answer, choices, gold


def _python(rng: random.Random, characters: int) -> list[str]:
    """Lines of unseen files with about so many characters, but for those that begin with a word of the needles."""
    hay = "".join(text for _, text in unseen())
    start = rng.randrange(max(1, len(hay) - characters))
    lines = (hay + hay)[start : start + characters].split("\n")[1:-1]
    return [line for line in lines if not ((first := FIRST_WORD.match(line)) and first[1] in KNOWN)]


def _sentences(rng: random.Random, characters: int) -> list[str]:
    """Sentences about places of things with so many characters."""
    found: list[str] = []
    while sum(map(len, found)) + len(found) < characters:
        a, b = rng.sample(WORDS, 2)
        found.append(rng.choice((f"A {a} stands near the {b}.", f"Nobody saw the {a} behind the {b}.")))
    return found


def _hidden(rng: random.Random, hay: list[str], needles: Sequence[str]) -> list[str]:
    """The hay with these lines at random places, in their order."""
    places = sorted(rng.randrange(len(hay) + 1) for _ in needles)
    for shift, (place, needle) in enumerate(zip(places, needles, strict=True)):
        hay.insert(place + shift, needle)
    return hay


def _keys(rng: random.Random, number: int) -> Facts:
    """Comments that put two words side by side."""
    words = rng.sample(KNOWN, 2 * KEYS)
    keys, values = words[:KEYS], words[KEYS:]
    choices, gold = ranked(rng, f" {values[0]}\n", [f" {value}\n" for value in values[1:]])
    needles = rng.sample([f"# {key} {value}" for key, value in zip(keys, values, strict=True)], KEYS)
    return needles, f"# {keys[0]}", values[0], choices, gold


def _values(rng: random.Random, number: int) -> Facts:
    """Calls of two functions; those of one are asked for once more. The wrong choices have arguments of the other."""
    words = rng.sample(KNOWN, 2 + 2 * VALUES)
    (key, other), mine, theirs = words[:2], words[2 : 2 + VALUES], words[2 + VALUES :]
    needles = [f"{key}({value})" for value in mine]
    for value in theirs:
        needles.insert(rng.randrange(len(needles) + 1), f"{other}({value})")

    def choice(values: list[str]) -> str:
        return f")\n{key}(".join(values) + ")\n"

    wrong = [theirs, [*mine[:-1], theirs[0]], [mine[0], *theirs[1:]]]
    choices, gold = ranked(rng, choice(mine), [choice(values) for values in wrong])
    return needles, f"{key}(", ", ".join(mine), choices, gold


def _chains(
    rng: random.Random, names: Sequence[str], values: Sequence[str], hops: int, first: str, link: str
) -> tuple[list[str], str]:
    """Two chains of assignments and two values that are assigned once, mixed, and the last name of the first chain.
    `first` and `link` say how a value and a name are assigned."""
    turns, rest = [], iter(names)
    for value, length in zip(values, [hops] * CHAINS + [0] * ALONE, strict=True):
        chain = [next(rest) for _ in range(length + 1)]
        steps = [first.format(name=chain[0], value=value)]
        turns.append(steps + [link.format(name=b, before=a) for a, b in zip(chain, chain[1:], strict=False)])
    order = [n for n, steps in enumerate(turns) for _ in steps]
    rng.shuffle(order)
    steps_of = [iter(steps) for steps in turns]
    return [next(steps_of[n]) for n in order], names[hops]


def _tracking(rng: random.Random, number: int) -> Facts:
    """Names that get their values from names."""
    hops = HOPS[number % len(HOPS)]
    words = rng.sample(KNOWN, CHAINS * (hops + 1) + ALONE + 4)
    names, values = words[4:], words[:4]
    needles, last = _chains(rng, names, values, hops, "{name} = '{value}'", "{name} = {before}")
    choices, gold = ranked(rng, f"{values[0]}'\n", [f"{value}'\n" for value in values[1:]])
    return needles, f"assert {last} == '", values[0], choices, gold


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(1000, 10_000), count)]


def _chat_keys(rng: random.Random, number: int) -> Facts:
    keys, values = rng.sample(WORDS, KEYS), _numbers(rng, KEYS)
    choices, gold = ranked(rng, values[0], values[1:])
    needles = rng.sample([f"The number of the {k} is {v}." for k, v in zip(keys, values, strict=True)], KEYS)
    return needles, f"What is the number of the {keys[0]}? Answer with the number only.", values[0], choices, gold


def _chat_values(rng: random.Random, number: int) -> Facts:
    (key, other), values = rng.sample(WORDS, 2), _numbers(rng, 2 * VALUES)
    mine, theirs = values[:VALUES], values[VALUES:]
    needles = [f"The {key} has the number {value}." for value in mine]
    for value in theirs:
        needles.insert(rng.randrange(len(needles) + 1), f"The {other} has the number {value}.")
    wrong = [theirs, [*mine[:-1], theirs[0]], [mine[0], *theirs[1:]]]
    choices, gold = ranked(rng, ", ".join(mine), [", ".join(each) for each in wrong])
    question = f"Which {VALUES} numbers does the {key} have? Answer with the numbers only."
    return needles, question, ", ".join(mine), choices, gold


def _chat_tracking(rng: random.Random, number: int) -> Facts:
    hops = HOPS[number % len(HOPS)]
    names, values = rng.sample(WORDS, CHAINS * (hops + 1) + ALONE), _numbers(rng, 4)
    sentences = "The {name} has the number {value}.", "The {name} has the same number as the {before}."
    needles, last = _chains(rng, names, values, hops, *sentences)
    choices, gold = ranked(rng, values[0], values[1:])
    return needles, f"Which number does the {last} have? Answer with the number only.", values[0], choices, gold


def _name(text: str) -> str | None:
    return match[1] if (match := NAME.match(text)) else None


def _arguments(text: str) -> str | None:
    return ", ".join(ARGUMENT.findall(text)) or None


def _one_number(text: str) -> str | None:
    return found.pop() if len(found := set(DIGITS.findall(text))) == 1 else None


def _all_numbers(text: str) -> str | None:
    return ", ".join(DIGITS.findall(text)) or None


def share_found(item: Item, prediction: str) -> float:
    """The share of the values that are in the prediction, in any order: RULER's score."""
    values, found = item.answer.split(", "), prediction.split(", ")
    return sum(value in found for value in values) / len(values)


def _probe(
    name: str, about: str, facts: Callable[[random.Random, int], Facts], parse: Callable[[str], str | None],
    max_new_tokens: int, *, chat: bool = False, stop: tuple[str, ...] = ("\n",),
) -> Task:  # fmt: skip
    """A task of examples that hide facts in a text."""

    def example(number: int, seed: int, characters: int) -> Item:
        rng = random.Random(f"{name} {seed} {number}")
        needles, question, answer, choices, gold = facts(rng, number)
        hay = (_sentences if chat else _python)(rng, characters)
        text = ("\n\n" if chat else "\n").join([(" " if chat else "\n").join(_hidden(rng, hay, needles)), question])
        return Item(number, text, answer, choices, gold, f"{characters:,} characters")

    def items(count: int, seed: int) -> list[Item]:
        return [example(n, seed, NEEDLE_LENGTHS[n % len(NEEDLE_LENGTHS)]) for n in range(count)]

    return Task(name, about, items, parse, max_new_tokens, stop, chat=chat, on_request=True, example=example)


def _with_share(task: Task) -> Task:
    return dataclasses.replace(task, grade=share_found)


PROBES = (
    _probe("multi_key", "the word beside one of several words, in a text", _keys, _name, 8),
    _with_share(_probe("multi_value", "all arguments of one function, in a text", _values, _arguments, 32, stop=())),
    _probe("tracking", "a value along a chain of assignments, in a text", _tracking, _name, 8),
    _probe("multi_key_chat", "the number of one of several things, in a text", _chat_keys, _one_number, 24, chat=True),
    _with_share(
        _probe(
            "multi_value_chat",
            "all numbers of one thing, in a text",
            _chat_values,
            _all_numbers,
            48,
            chat=True,
            stop=(),
        )
    ),
    _probe("tracking_chat", "a number along a chain of things, in a text", _chat_tracking, _one_number, 24, chat=True),
)
