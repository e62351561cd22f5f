"""Two readings of the same questions from the same prompt: what a model writes, and what it ranks first.

"When Perplexity Lies" (arXiv 2603.26556): a distilled model can rank like its teacher and write far worse.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from convert.data.prompts import encode, left_padded
from convert.evaluation.tasks import Item, Task
from convert.models.cache import CACHE_NAME

BATCH_ROWS = 64
BATCH_TOKENS = 16_384  # of prompts, padding included (ours)
STEP = (
    32  # tokens of a prompt that cost a CPU as much as one step of a batch that writes (ours, measured with neox-nano)
)


@dataclass(frozen=True)
class Answer:
    """To items[`item`]. `said`: what was parsed, or the choice ranked first; None: unparsable. `tokens`: what was
    generated, up to the stop. `nats`: log p of each choice."""

    item: int
    right: bool
    said: str | None
    text: str = ""
    tokens: tuple[int, ...] = ()
    nats: tuple[float, ...] = ()


def prompt_ids(tokenizer, task: Task, prompt: str) -> list[int]:
    """As the model is asked: in its chat template if the task is a chat, else as plain text."""
    return encode(tokenizer, prompt, chat=task.chat)


def _continued(tokenizer, task: Task, item: Item) -> tuple[list[int], list[list[int]]]:
    """The ids of the prompt, and of each choice behind it. As in lm-evaluation-harness a choice is what prompt and
    choice together have behind the prompt's own ids."""
    prompt = prompt_ids(tokenizer, task, item.prompt)
    rests = [encode(tokenizer, item.prompt, choice, chat=task.chat)[len(prompt) :] for choice in item.choices]
    alone = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in item.choices]
    return prompt, [rest or other for rest, other in zip(rests, alone, strict=True)]  # a tokenizer may join the two


def fits(model: PreTrainedModel, tokenizer, task: Task, items: Sequence[Item]) -> list[int]:
    """The items whose prompt and answer have room in the model's positions."""
    room, found = model.config.max_position_embeddings, []
    for i, item in enumerate(items):
        prompt, rests = _continued(tokenizer, task, item)
        if len(prompt) + max(task.max_new_tokens, *map(len, rests)) <= room:
            found.append(i)
    return found


def batches(
    lengths: Sequence[int], rows: int = BATCH_ROWS, tokens: int = BATCH_TOKENS, padding: float = math.inf
) -> Iterator[list[int]]:
    """Places of equal or similar lengths, longest first: the most memory is needed at once, or never. `padding`: tokens
    of it in a batch."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        longest = lengths[order[0]]
        added = accumulate(longest - lengths[i] for i in order)
        size = min(rows, max(1, tokens // max(1, longest)), sum(so_far <= padding for so_far in added))
        yield order[:size]
        order = order[size:]


Done = Callable[[list[int]], bool]  # whether the answers to these items are known


def by_generation(
    model: PreTrainedModel,
    tokenizer,
    task: Task,
    items: Sequence[Item],
    *,
    rows: int | None = None,
    known: Done = lambda _: False,
) -> Iterator[list[Answer]]:
    """Greedy, in left-padded batches, with the model's own cache; a batch of answers at a time. A CPU pays for padding
    as for text: there a batch ends where its padding would cost more than the steps of another."""
    prompts = [prompt_ids(tokenizer, task, item.prompt) for item in items]
    padding = STEP * task.max_new_tokens if model.device.type == "cpu" else math.inf
    for batch in batches([len(ids) for ids in prompts], rows or BATCH_ROWS, padding=padding):
        if not known(batch):
            written = _generate(model, tokenizer, task, [prompts[i] for i in batch])
            yield [_answer(tokenizer, task, items[i], i, ids) for i, ids in zip(batch, written, strict=True)]


def by_likelihood(
    model: PreTrainedModel, tokenizer, task: Task, items: Sequence[Item], *, known: Done = lambda _: False
) -> Iterator[list[Answer]]:
    """The choice with the largest log p, summed over its tokens, is what the model says. A question at a time: its
    prompt is read once."""
    for i, item in enumerate(items):
        if not known([i]):
            nats = _log_p(model, *_continued(tokenizer, task, item))
            best = max(range(len(nats)), key=nats.__getitem__)
            yield [Answer(i, best == item.gold, item.choices[best], nats=nats)]


READINGS = {"generation": by_generation, "likelihood": by_likelihood}


class _Written(StoppingCriteria):
    """A row is done when a stop follows its first word."""

    def __init__(self, tokenizer, stop: tuple[str, ...], prompt_length: int):
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        return torch.tensor([cut(text, self.stop) != text for text in texts], device=input_ids.device)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Up to the first stop behind white space."""
    start = len(text) - len(text.lstrip())
    return text[: min([at for s in stop if (at := text.find(s, start)) >= 0], default=len(text))]


@contextmanager
def greedily(model: PreTrainedModel) -> Iterator[None]:
    """Without what a model's own settings add to `do_sample=False`: a penalty for repeating would punish copying."""
    its_own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=its_own.bos_token_id,
        eos_token_id=its_own.eos_token_id,
        pad_token_id=its_own.pad_token_id,
        use_cache=its_own.use_cache,
    )
    try:
        yield
    finally:
        model.generation_config = its_own


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer, task: Task, prompts: list[list[int]]) -> list[list[int]]:
    pad = tokenizer.pad_token_id
    ids, mask = left_padded(prompts, pad, model.device)
    longest = ids.shape[1]
    stops = StoppingCriteriaList([_Written(tokenizer, task.stop, longest)] if task.stop else [])
    ends = end_ids(model, tokenizer)
    with greedily(model):
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=task.max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=ends,
            stopping_criteria=stops,
        )
    return [
        row[: next((n for n, token in enumerate(row) if token in (pad, *ends)), len(row))]
        for row in new[:, longest:].tolist()
    ]


def end_ids(model: PreTrainedModel, tokenizer) -> list[int]:
    """The ids that end a text: those of the model's settings, and the tokenizer's."""
    its_own = model.generation_config.eos_token_id
    return sorted({*(its_own if isinstance(its_own, list) else [its_own]), tokenizer.eos_token_id} - {None})


def _answer(tokenizer, task: Task, item: Item, index: int, ids: list[int]) -> Answer:
    text = cut(tokenizer.decode(ids, skip_special_tokens=True), task.stop)
    said = task.parse(text)
    return Answer(index, said == item.answer, said, text, tuple(ids))


@torch.no_grad()
def _log_p(model: PreTrainedModel, prompt: list[int], rests: list[list[int]]) -> tuple[float, ...]:
    """Of each continuation of the prompt, whose cache serves all of them. They are padded on the right, where nothing
    real can see it."""
    out = model(torch.tensor([prompt], device=model.device), use_cache=True, logits_to_keep=1)
    first = out.logits[0, -1].float().log_softmax(-1)
    found, longest = [first[rest[0]].item() for rest in rests], max(map(len, rests))
    if longest > 1:
        rows = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests], device=model.device)
        out[CACHE_NAME].batch_select_indices(torch.zeros(len(rests), dtype=torch.long, device=model.device))
        logits = model(rows[:, :-1], use_cache=True, **{CACHE_NAME: out[CACHE_NAME]}).logits.float()
        logs = logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0].tolist()
        found = [first + sum(row[: len(rest) - 1]) for first, row, rest in zip(found, logs, rests, strict=True)]
    return tuple(found)
