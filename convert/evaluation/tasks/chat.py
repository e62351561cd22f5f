"""Tasks for models that follow instructions: facts that every Python knows, by the letter; sums; and answers in a given
form."""

import calendar
import contextlib
import functools
import html.entities
import json
import random
import re
import unicodedata
import zoneinfo
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from convert.core.errors import UserError
from convert.evaluation.tasks.base import LETTERS, Item, Task, prompts_of, ranked

# none begins with another
WORDS = (
    "river table green apple house music window bread yellow cloud garden island kitchen lemon mountain number orange"
    " paper queen silver tiger uncle village winter bottle candle dinner engine flower guitar hammer jacket kettle"
    " letter mirror needle office pencil rabbit school ticket valley wagon anchor basket camera desert eagle forest"
    " glass honey iron jungle knife ladder market north ocean pepper quiet road salt train umbrella violin water blue"
    " doctor earth friend gold horse king light morning night plane ring stone tower wood"
).split()
TRAINING_WORDS = (  # for prompts to train on: none of the words above
    "ant bear cave drum elbow fence grape hat ink jar knot leaf moon nest oak pear quilt rope sand tent urn vase wolf"
    " yard zebra arrow bridge cherry donkey ear flute goat hill ivory jelly kite lamp mask nail onion pond shoe"
    " towel"
).split()
CHARACTERS = "%&*+/<=>?@[]^{|}~£¥§©°±¶¿×÷€Ωπλ→∞√"
TRAINING_CHARACTERS = "!#$(),-.:;_`¡¢¦ª«¬®²³µ·»¼½¾ΔΣαβγδ←↑↓≈≠≤≥"
ENTITIES = "amp lt gt copy reg euro pound yen cent sect deg para times divide plusmn micro rarr".split()
TRAINING_ENTITIES = "iexcl laquo raquo frac12 frac14 sup2 sup3 middot iquest alpha beta gamma delta larr uarr".split()
AREAS = ("Africa", "America", "Asia", "Australia", "Europe")
LETTER = r"([B-D]|A(?! (?!is\b|because\b)[a-z]))(?!['’]?[A-Za-z])"  # "A river" is no answer, "C'est" neither
STATED = re.compile(r"(?i:\banswer)\W*(?i:is\b)?\W*" + LETTER)
FIRST = re.compile(r"\W*(?:(?i:the |correct |right |option|letter|choice|is\b)\W*)*" + LETTER)
LATER = re.compile(r"(?:\bis|:|\b(?i:choose|pick|option|choice))\W*" + LETTER)
RESULT = re.compile(r"=|:|\bis\b|\bequals\b")
SIGN = re.compile(r"(^|=|:|\bis|\bequals)\s*-\s+(?=\d)")  # "5 - 8 = - 3"
NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.0+)?(?![\d.]*\d)")


@functools.cache
def _zones() -> list[str]:
    """The time zones of AREAS; they are files, which takes long to find."""
    return sorted(z for z in zoneinfo.available_timezones() if z.split("/")[0] in AREAS and z.count("/") == 1)


def _time_zone(rng: random.Random) -> tuple[str, str, list[str]]:
    zones = _zones()
    if not zones:
        raise UserError(
            "The task facts asks about time zones, and this machine has no list of them; pip install tzdata."
        )
    areas = Counter(zone.split("/")[1] for zone in zones)
    area, city = rng.choice([zone for zone in zones if areas[zone.split("/")[1]] == 1]).split("/")  # Istanbul is in two
    city = city.replace("_", " ")
    return f"In which part of the world is the time zone of {city}?", area, [other for other in AREAS if other != area]


def _character(rng: random.Random, characters: str = CHARACTERS) -> tuple[str, str, list[str]]:
    right, *wrong = rng.sample(characters, 4)
    return (
        f"What is the name of the character {right} in Unicode?",
        unicodedata.name(right),
        [unicodedata.name(w) for w in wrong],
    )


def _calendar(rng: random.Random) -> tuple[str, str, list[str]]:
    names = list(calendar.day_name) if rng.random() < 0.5 else list(calendar.month_name)[1:]
    at = rng.randrange(len(names))
    right, kind = names[(at + 1) % len(names)], "day" if len(names) == 7 else "month"
    return f"Which {kind} comes right after {names[at]}?", right, [n for n in names if n not in (right, names[at])]


def _entity(rng: random.Random, known: Sequence[str] = ENTITIES) -> tuple[str, str, list[str]]:
    right, *wrong = rng.sample(known, 4)
    char = {name: chr(html.entities.name2codepoint[name]) for name in (right, *wrong)}
    return f"Which character does the HTML entity &{right}; stand for?", char[right], [char[w] for w in wrong]


FACTS: dict[str, Callable[[random.Random], tuple[str, str, list[str]]]] = {
    "time zones": _time_zone,
    "characters": _character,
    "calendar": _calendar,
    "entities": _entity,
}
TRAINING_FACTS = {
    "characters": functools.partial(_character, characters=TRAINING_CHARACTERS),
    "entities": functools.partial(_entity, known=TRAINING_ENTITIES),
}


def _facts(count: int, seed: int, kinds: Mapping[str, Callable] = FACTS) -> list[Item]:
    """Make every example in four orders: each option stands once at each letter."""
    rng, items = random.Random(f"facts {seed}"), []
    seen: set[str] = set()
    for attempt in range(20 * count):
        number = len(seen)
        if number == count:
            break
        group = list(kinds)[attempt % len(kinds)]
        question, right, wrong = kinds[group](rng)
        options = rng.sample([right, *rng.sample(wrong, 3)], 4)
        if question in seen:
            continue
        seen.add(question)
        for shift in range(4):
            order = options[shift:] + options[:shift]
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, order, strict=True))
            prompt = f"{question}\n{listed}\nAnswer with the letter of the right option only."
            gold = order.index(right)
            items.append(Item(number, prompt, LETTERS[gold], tuple(LETTERS), gold, group))
    return items


def letter(text: str) -> str | None:
    """Find the letter that the text calls the answer, begins with, or says later; "a" is one where there is nothing
    else."""
    alone = text.strip(" \n\t.()*\"'")
    if len(alone) == 1 and alone in "abcd":
        return alone.upper()
    match = STATED.search(text) or FIRST.match(text) or LATER.search(text)
    return match[1] if match else None


def _sums(count: int, seed: int, first: tuple[int, int] = (2, 60)) -> list[Item]:
    """Ask for a sum, difference or product; `first`: the least and the largest first number."""
    rng = random.Random(f"sums {seed}")
    items: list[Item] = []
    seen: set[tuple[int, str, int]] = set()
    for _ in range(20 * count):
        number = len(items)
        if number == count:
            break
        a, b = rng.randint(*first), rng.randint(2, 39)
        sign = rng.choice("+-*") if a < 13 and b < 13 else rng.choice("+-")
        if (a, sign, b) in seen:
            continue
        seen.add((a, sign, b))
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        near = [str(result + d) for d in (-10, -2, -1, 1, 2, 10)]
        wrong = [w for w in rng.sample(near, 6) if not w.startswith(str(result)) and not str(result).startswith(w)]
        wrong = [w for i, w in enumerate(wrong) if not any(w.startswith(v) or v.startswith(w) for v in wrong[:i])]
        spare = [
            str(s)
            for s in range(abs(result) + 101, abs(result) + 999)
            if not any(str(s).startswith(w) for w in (*wrong, str(result)))
        ]
        choices, gold = ranked(rng, str(result), wrong + spare[:3])
        items.append(
            Item(
                number,
                f"What is {a} {sign} {b}? Answer with the number only.",
                str(result),
                choices,
                gold,
                f"a {sign} b",
            )
        )
    return items


def _result(text: str) -> str | None:
    """Find the result in texts such as "17 + 25 = 42" and "The sum of 17 and 25 is 42."."""
    text = SIGN.sub(r"\1 -", text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-"))
    for part in (RESULT.split(text)[-1], text):
        if len(found := NUMBER.findall(part)) == 1:
            return found[0].split(".")[0]
    return None


def _forms(count: int, seed: int, words: Sequence[str] = WORDS) -> list[Item]:
    """Ask for an exact form of common words: capitals, repetition, order, a list, JSON."""
    rng = random.Random(f"forms {seed}")
    items: list[Item] = []
    seen: set[str] = set()
    for attempt in range(20 * count):
        number = len(items)
        if number == count:
            break
        a, b, c, d = rng.sample(words, 4)
        kinds = {
            "capitals": (f"Write the word {a} in capital letters.", a.upper(), [a, a.title(), b.upper()]),
            "repetition": (
                f"Write the word {a} three times, with hyphens between.",
                f"{a}-{a}-{a}",
                [f"{a} {a} {a}", f"{a}-{a}\n", f"{b}-{b}-{b}"],
            ),
            "list": (
                f"Write {a}, {b} and {c} as a list with semicolons between.",
                f"{a}; {b}; {c}",
                [f"{a}, {b}, {c}", f"{b}; {a}; {c}", f"- {a}\n- {b}\n- {c}"],
            ),
            "JSON": (
                f'Write a JSON object with one key, "name", whose value is "{a}".',
                f'{{"name": "{a}"}}',
                [f'{{"{a}": "name"}}', f"name: {a}", f'{{"name": "{b}"}}'],
            ),
            "order": (
                f"Write the words {a} {b} in the opposite order.",
                f"{b} {a}",
                [f"{a} {b}", f"{b} {c}", f"{d} {a}"],
            ),
        }
        group = list(kinds)[attempt % len(kinds)]
        question, right, wrong = kinds[group]
        if question not in seen:
            seen.add(question)
            choices, gold = ranked(rng, right, wrong)
            items.append(Item(number, f"{question} Write nothing else.", right, choices, gold, group))
    return items


def _form(text: str) -> str | None:
    """Take everything that was written, JSON and lists with the usual spaces; nothing but silence is unparsable."""
    text = text.strip()
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.dumps(json.loads(text))
    return re.sub(r"\s*;\s*", "; ", text) or None


CHAT = (
    Task(
        "facts",
        "time zones, Unicode, the calendar, HTML entities, by the letter",
        _facts,
        letter,
        16,
        chat=True,
        lettered=True,
        training_prompts=prompts_of(functools.partial(_facts, kinds=TRAINING_FACTS)),
    ),
    Task(
        "sums",
        "sums of small numbers",
        _sums,
        _result,
        24,
        chat=True,
        training_prompts=prompts_of(functools.partial(_sums, first=(61, 99))),
    ),
    Task(
        "forms",
        "an answer in exactly the form asked for",
        _forms,
        _form,
        40,
        stop=(),
        chat=True,
        training_prompts=prompts_of(functools.partial(_forms, words=TRAINING_WORDS)),
    ),
)
