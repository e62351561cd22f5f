"""Two scoring methods for the same prompts: what a model writes (generation), and what it ranks first (likelihood).

"When Perplexity Lies" (arXiv 2603.26556): a distilled model can rank like its teacher and write far worse.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.data.prompts import encode
from convert.evaluation.generation import generate, prefill
from convert.evaluation.tasks import Item, Task
from convert.models.cache import CACHE_NAME
from convert.runs.keys import Scoring

BATCH_ROWS = 64
BATCH_TOKENS = 16_384  # of prompts, padding included (ours)
STEP_TOKENS = 32  # prompt tokens that cost a CPU as much as one decoding step of a batch (ours, with neox-nano)


@dataclass(frozen=True)
class Answer:
    """Answer of a model to items[`item`].

    `prediction` is what was parsed, or the choice ranked first; None where nothing could be parsed. `tokens` are what
    was generated, up to the stop. `nats` are the log probabilities of the choices. `share` is how much of the answer
    the prediction has; an answer is `correct` where it has all of it."""

    item: int
    correct: bool
    prediction: str | None
    text: str = ""
    tokens: tuple[int, ...] = ()
    nats: tuple[float, ...] = ()
    share: float | None = None

    @property
    def score(self) -> float:
        """What the answer counts, 0 to 1."""
        return float(self.correct) if self.share is None else self.share


def graded(task: Task, item: Item, answer: Answer) -> Answer:
    """The answer with its text parsed and graded by the task."""
    prediction = task.parse(answer.text)
    share = 0.0 if prediction is None else task.grade(item, prediction)
    return replace(answer, prediction=prediction, correct=share == 1, share=None if share in (0, 1) else share)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, task: Task, prompt: str) -> list[int]:
    """Token ids of a prompt as the model sees it: in its chat template if the task is a chat, else as plain text."""
    return encode(tokenizer, prompt, chat=task.chat)


def _continued(tokenizer: PreTrainedTokenizerBase, task: Task, item: Item) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of each choice behind it. As in lm-evaluation-harness a choice is what prompt and
    choice together have behind the prompt's own ids."""
    prompt = prompt_ids(tokenizer, task, item.prompt)
    rests = [encode(tokenizer, item.prompt, choice, chat=task.chat)[len(prompt) :] for choice in item.choices]
    alone = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in item.choices]
    return prompt, [rest or other for rest, other in zip(rests, alone, strict=True)]  # a tokenizer may join the two


def fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, items: Sequence[Item]) -> list[int]:
    """Places of the items whose prompt and answer fit into the model's positions."""
    room, found = model.config.max_position_embeddings, []
    for i, item in enumerate(items):
        prompt, rests = _continued(tokenizer, task, item)
        if len(prompt) + max(task.max_new_tokens, *map(len, rests)) <= room:
            found.append(i)
    return found


def batches(
    lengths: Sequence[int], rows: int = BATCH_ROWS, tokens: int = BATCH_TOKENS, padding: float = math.inf
) -> Iterator[list[int]]:
    """Batches of places of similar lengths, longest first: the most memory is needed at once, or never.

    A batch has at most so many `rows`, `tokens` with its padding, and tokens of `padding`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        longest = lengths[order[0]]
        added = accumulate(longest - lengths[i] for i in order)
        size = min(rows, max(1, tokens // max(1, longest)), sum(so_far <= padding for so_far in added))
        yield order[:size]
        order = order[size:]


IsKnown = Callable[[list[int]], bool]  # whether the answers to the items at these places are known


class ScoringMethod(Protocol):
    """A way to score a model on items: yields batches of answers."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        items: Sequence[Item],
        *,
        known: IsKnown = ...,
    ) -> Iterator[list[Answer]]:
        """Answers, a batch at a time; a batch all of whose answers are known is left out."""


def by_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[Item],
    *,
    rows: int | None = None,
    known: IsKnown = lambda _: False,
) -> Iterator[list[Answer]]:
    """Let the model write greedily, in left-padded batches of at most `rows` prompts, and parse its texts.

    A CPU pays for padding as for text: there a batch ends where its padding would cost more than the steps of
    another."""
    prompts = [prompt_ids(tokenizer, task, item.prompt) for item in items]
    padding = STEP_TOKENS * task.max_new_tokens if model.device.type == "cpu" else math.inf
    for batch in batches([len(ids) for ids in prompts], rows or BATCH_ROWS, padding=padding):
        if not known(batch):
            written = _written(model, tokenizer, task, [prompts[i] for i in batch])
            yield [_answer(tokenizer, task, items[i], i, ids) for i, ids in zip(batch, written, strict=True)]


def by_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[Item],
    *,
    known: IsKnown = lambda _: False,
) -> Iterator[list[Answer]]:
    """Take the choice with the largest log probability, summed over its tokens, as the prediction. An item at a time:
    its prompt is run once."""
    for i, item in enumerate(items):
        if not known([i]):
            nats = _log_p(model, *_continued(tokenizer, task, item))
            best = max(range(len(nats)), key=nats.__getitem__)
            yield [Answer(i, best == item.gold, item.choices[best], nats=nats)]


SCORING_METHODS: dict[Scoring, ScoringMethod] = {"generation": by_generation, "likelihood": by_likelihood}


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first stop behind leading white space."""
    start = len(text) - len(text.lstrip())
    return text[: min([at for s in stop if (at := text.find(s, start)) >= 0], default=len(text))]


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: list[list[int]]
) -> list[list[int]]:
    """Token ids that the model writes after each prompt. A text is complete when a stop follows its first word."""
    stop = (lambda text: cut(text, task.stop) != text) if task.stop else None
    return generate(model, tokenizer, prompts, task.max_new_tokens, stop=stop)


def _answer(tokenizer: PreTrainedTokenizerBase, task: Task, item: Item, index: int, ids: list[int]) -> Answer:
    text = cut(tokenizer.decode(ids, skip_special_tokens=True), task.stop)
    return graded(task, item, Answer(index, False, None, text, tuple(ids)))


@torch.no_grad()
def _log_p(model: PreTrainedModel, prompt: list[int], rests: list[list[int]]) -> tuple[float, ...]:
    """Log probability of each continuation of the prompt, whose cache serves all of them. They are padded on the right,
    where no real token can see it."""
    logits, cache = prefill(model, torch.tensor([prompt], device=model.device))
    first = logits[0, -1].float().log_softmax(-1)
    begins = torch.tensor([rest[0] for rest in rests], device=model.device)
    found, longest = first[begins].tolist(), max(map(len, rests))
    if longest > 1:
        rows = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=model.device)
        cache.batch_select_indices(torch.zeros(len(rests), dtype=torch.long, device=model.device))
        logits = model(rows[:, :-1], use_cache=True, **{CACHE_NAME: cache}).logits
        logs = logits.float().log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0].tolist()
        found = [first + sum(row[: len(rest) - 1]) for first, row, rest in zip(found, logs, rests, strict=True)]
    return tuple(found)
