"""Tasks that a state of constant size may fail at, in Python: copying, recall among several keys, one fact in a long
text."""

import functools
import random
import re

from convert.evaluation.tasks.base import Item, Task, prompts_of, ranked
from convert.evaluation.tasks.code import unseen

NUMBER = re.compile(r"\s*(-?\d+)")
LISTED = re.compile(r"([^\])]*)[\])]")
KNOWN = (
    "name value path text data list key item file line type result message string object index size count time args"
).split()
TRAINING_KNOWN = (  # for prompts to train on: none of the names above
    "index value_type start stop step width height source target left right first last parent child node label level"
    " mode flags buffer"
).split()
NEEDLE_LENGTHS = (500, 1000, 2000, 4000)  # characters
DEPTHS = (0.1, 0.5, 0.9)


CONSONANTS = "bdfgklmnprstvz"
TRAINING_CONSONANTS = CONSONANTS + "hjw"  # a word to train on has one of the last three


def words(rng: random.Random, count: int, consonants: str = CONSONANTS) -> list[str]:
    """Different words of three syllables that mean nothing."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = "".join(rng.choice(consonants) + rng.choice("aeiou") for _ in range(3))
        if consonants == CONSONANTS or not set(word) <= set(CONSONANTS + "aeiou"):
            found[word] = None
    return list(found)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10, 100), count)]


def _copying(
    count: int, seed: int, names: list[str] = KNOWN, consonants: str = CONSONANTS, stream: str = "copying"
) -> list[Item]:
    """Ask for a list once more, from its second word on: arguments with names that code is full of, or words that mean
    nothing. The wrong choices have words exchanged, or one too many."""
    rng, items = random.Random(f"{stream} {seed}"), []
    for number in range(count):
        known, length = (True, 3 + number // 2 % 2) if number % 2 == 0 else (False, 4 + 2 * (number // 2 % 2))
        listed = rng.sample(names, length) if known else [f"'{word}'" for word in words(rng, length, consonants)]
        begin, again, end = (
            ("def run(", "):\n    return run(", ")") if known else ("names = [", "]\nassert names == [", "]")
        )
        wrong: dict[str, None] = {}
        while len(wrong) < 3:
            other = rng.sample(listed[1:], length - 1) + rng.choice(([], listed[:1]))
            if other != listed[1:]:
                wrong[f" {', '.join(other)}{end}\n"] = None
        right = ", ".join(listed[1:])
        choices, gold = ranked(rng, f" {right}{end}\n", list(wrong))
        prompt = f"{begin}{', '.join(listed)}{again}{listed[0]},"
        items.append(Item(number, prompt, right, choices, gold, f"{length} {'known' if known else 'unknown'} words"))
    return items


def _copied(text: str) -> str | None:
    return ", ".join(part.strip() for part in found[1].split(",")) if (found := LISTED.match(text)) else None


def _keys(count: int, seed: int, consonants: str = CONSONANTS, stream: str = "keys") -> list[Item]:
    """Ask for the number that belongs to one of several keys; the wrong choices belong to others."""
    rng, items = random.Random(f"{stream} {seed}"), []
    for number in range(count):
        pairs = 4 << number % 3
        keys, values = words(rng, pairs, consonants), _numbers(rng, pairs)
        wanted = rng.randrange(pairs)
        table = ", ".join(f"'{key}': {value}" for key, value in zip(keys, values, strict=True))
        prompt = f"ages = {{{table}}}\nassert ages['{keys[wanted]}'] =="
        wrong = rng.sample([v for v in values if v != values[wanted]], 3)
        choices, gold = ranked(rng, f" {values[wanted]}\n", [f" {v}\n" for v in wrong])
        items.append(Item(number, prompt, values[wanted], choices, gold, f"{pairs} keys"))
    return items


def needles(
    count: int, seed: int, lengths: tuple[int, ...] = NEEDLE_LENGTHS, depths: tuple[float, ...] = DEPTHS
) -> list[Item]:
    """Ask at the end for one assignment that stands somewhere in so many characters of code."""
    rng, items = random.Random(f"needle {seed}"), []
    hay = "".join(text for _, text in unseen())
    for number in range(count):
        length, depth = lengths[number % len(lengths)], depths[number // len(lengths) % len(depths)]
        start = rng.randrange(max(1, len(hay) - length))
        lines = (hay + hay)[start : start + length].split("\n")[1:-1]
        (name,), values = words(rng, 1), _numbers(rng, 4)
        lines.insert(round(depth * len(lines)), f"{name} = {values[0]}")
        prompt = "\n".join(lines) + f"\n\nassert {name} =="
        choices, gold = ranked(rng, f" {values[0]}\n", [f" {v}\n" for v in values[1:]])
        items.append(Item(number, prompt, values[0], choices, gold, f"{length:,} characters, depth {depth:.0%}"))
    return items


def _number(text: str) -> str | None:
    return match[1] if (match := NUMBER.match(text)) else None


_copying_to_train_on = functools.partial(
    _copying, names=TRAINING_KNOWN, consonants=TRAINING_CONSONANTS, stream="training copying"
)
_keys_to_train_on = functools.partial(_keys, consonants=TRAINING_CONSONANTS, stream="training keys")

RECALL = (
    Task(
        "copying",
        "a list of unknown words once more",
        _copying,
        _copied,
        64,
        training_prompts=prompts_of(_copying_to_train_on),
    ),
    Task(
        "keys",
        "the number that belongs to a key, among several",
        _keys,
        _number,
        6,
        training_prompts=prompts_of(_keys_to_train_on),
    ),
    Task("needle", "one assignment in a long text", needles, _number, 6),
)
