"""Recall by the length of the text in tokens: the needle by its depth, and the probes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.data.prompts import has_chat_template
from convert.evaluation.scoring import SCORING_METHODS, Answer, prompt_ids
from convert.evaluation.statistics import score
from convert.evaluation.tasks import TASKS, Item, Task, needles
from convert.runs.keys import Scoring

FULL = 0.9  # of the length is filled, at least, where the text allows it (ours)
Rows = list[tuple[str, str, int, dict[Scoring, float]]]  # model, task, length, score by scoring method


def fitted(tokenizer: PreTrainedTokenizerBase, task: Task, length: int, make: Callable[[int], Item]) -> Item:
    """An item that fills so many tokens, the room for its answer included, to nine tenths at least where the text
    allows it. `make` makes it of so many characters of text; UserError where it is longer without any."""
    characters, best = 3 * length, None
    for _ in range(16):
        item = make(characters)
        tokens = len(prompt_ids(tokenizer, task, item.prompt)) + task.max_new_tokens
        if tokens <= length:
            best = item
            if tokens >= FULL * length:
                break
        characters = max(1, int(characters * 0.95 * length / tokens))
    if best is None:
        raise UserError(f"An example of {task.name} needs more than {length} tokens; give larger lengths.")
    return best


def needles_found(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int], depths: Sequence[float], each: int,
) -> Iterator[tuple[str, int, float, dict[Scoring, float]]]:  # fmt: skip
    """Model, length in tokens, depth, and the share of needles found by each scoring method, of `each` examples."""
    task = TASKS["needle"]
    for length, (name, model) in (
        bar := tqdm(list(itertools.product(lengths, models.items())), desc="needles", unit="model")
    ):
        bar.set_description(f"needles, {length:,} tokens, {name}")
        items = [needle_of(tokenizer, task, length, depth, seed) for seed in range(each) for depth in depths]
        answers = _answers(model, tokenizer, task, items)
        for number, depth in enumerate(depths):
            mine = range(number, len(items), len(depths))
            shares = {key: sum(a.correct for a in some if a.item in mine) / each for key, some in answers.items()}
            yield name, length, depth, shares


def needle_of(tokenizer: PreTrainedTokenizerBase, task: Task, length: int, depth: float, seed: int) -> Item:
    """A needle that fills so many tokens, the room for its answer included."""
    return fitted(tokenizer, task, length, lambda characters: needles(1, seed, (characters,), (depth,))[0])


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item]
) -> dict[Scoring, list[Answer]]:
    """The answers of a model by each scoring method."""
    return {
        scoring: [answer for batch in method(model, tokenizer, task, items) for answer in batch]
        for scoring, method in SCORING_METHODS.items()
    }


def probes_for(tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The probes for a model: those in its chat template where it has one, else those in Python."""
    chat = has_chat_template(tokenizer)
    return [task for task in TASKS.values() if task.example is not None and task.chat is chat]


def scores_by_length(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task],
    lengths: Sequence[int], count: int, seed: int = 0,
) -> Rows:  # fmt: skip
    """Score models on so many examples of each task at each length (in tokens), by both scoring methods. All models
    see the same prompts; example `i` of a seed hides the same facts at every length."""
    rows: Rows = []
    for task, length in (bar := tqdm(list(itertools.product(tasks, lengths)), desc="probes", unit="length")):
        bar.set_description(f"{task.name}, {length:,} tokens")
        items = [_item(tokenizer, task, length, number, seed) for number in range(count)]
        for name, model in models.items():
            found = _answers(model, tokenizer, task, items)
            rows.append((name, task.name, length, {key: score(items, some)["score"] for key, some in found.items()}))
    return rows


def _item(tokenizer: PreTrainedTokenizerBase, task: Task, length: int, number: int, seed: int) -> Item:
    assert task.example is not None
    example = task.example
    return fitted(tokenizer, task, length, lambda characters: example(number, seed, characters))
