"""Tasks of examples with one right answer each. A task says how models are prompted and what counts as an answer;
`convert.evaluation.scoring` prompts them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "ABCD"
LIMIT = 48  # examples of each task (ours: three minutes for two small models on a laptop)


@dataclass(frozen=True)
class Item:
    """A prompt of an example, the answer that `Task.parse` must find in what is generated, and the continuations that
    are ranked by likelihood.

    `choices[gold]` is the right one. No choice begins with another: the shorter of two would always be the likelier.
    `example` is shared by the items that ask the same thing with its options in another order. `group` is what a score
    may be broken down by."""

    example: int
    prompt: str
    answer: str
    choices: tuple[str, ...]
    gold: int
    group: str = ""


def exact(item: Item, prediction: str) -> float:
    """1 where the prediction is the answer, else 0."""
    return float(prediction == item.answer)


@dataclass(frozen=True)
class Task:
    """A kind of examples. `items(count, seed)` makes the items of that many examples, always the same, or of all that
    there are. `parse` finds the answer in a generated text, None if there is none.

    `stop` says where generation ends, if not at `max_new_tokens` or the model's own end. In a `chat` the prompt is a
    user's message, for models that have a chat template. In a `lettered` task the answer is the letter of an option,
    and every example comes in four orders of its options.

    `grade` says which share of the answer a prediction has. A task is part of every evaluation unless it is
    `on_request`; one that `executes_code` grades by running what models wrote, if the user allows it.
    `example(number, seed, characters)` makes one example at a length, where a task has lengths.

    `training_prompts(count, seed)` makes prompts of the same kind to train on, or as many as there are. None is the
    prompt of an item, whatever count and seed: they come from other files, words, numbers or characters."""

    name: str
    about: str
    items: Callable[[int, int], list[Item]]
    parse: Callable[[str], str | None]
    max_new_tokens: int
    stop: tuple[str, ...] = ("\n",)
    chat: bool = False
    lettered: bool = False
    grade: Callable[[Item, str], float] = exact
    on_request: bool = False
    executes_code: bool = False
    example: Callable[[int, int, int], Item] | None = None
    training_prompts: Callable[[int, int], list[str]] | None = None


def prompts_of(items: Callable[[int, int], list[Item]]) -> Callable[[int, int], list[str]]:
    """The prompts of these items, each once."""
    return lambda count, seed: list(dict.fromkeys(item.prompt for item in items(count, seed)))


def ranked(rng: random.Random, right: str, wrong: list[str]) -> tuple[tuple[str, ...], int]:
    """Four choices in a random order, and the place of the right one."""
    choices = rng.sample([right, *wrong[:3]], 4)
    return tuple(choices), choices.index(right)
