"""Two readings of the same questions from the same prompt: what a model writes, and what it ranks first.

"When Perplexity Lies" (arXiv 2603.26556): a distilled model can rank like its teacher and write far worse.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from convert.tasks import Item, Task

BATCH_ROWS = 64
BATCH_TOKENS = 16_384  # of prompts, padding included (ours)
LOGITS = 1 << 26  # held at once


@dataclass(frozen=True)
class Answer:
    """To items[`item`]. `said`: what was parsed, or the choice ranked first; None: unparsable. `tokens`: what was generated, up to the
    stop. `nats`: log p of each choice."""

    item: int
    right: bool
    said: str | None
    text: str = ""
    tokens: tuple[int, ...] = ()
    nats: tuple[float, ...] = ()


def prompt_ids(tokenizer, task: Task, prompt: str) -> list[int]:
    """As the model is asked: in its chat template if the task is a chat, else as plain text."""
    return _ids(tokenizer, task, prompt, "")


def _ids(tokenizer, task: Task, prompt: str, answer: str) -> list[int]:
    if not task.chat:
        return tokenizer(prompt + answer)["input_ids"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text + answer, add_special_tokens=False)["input_ids"]


def _continued(tokenizer, task: Task, item: Item) -> list[tuple[list[int], int]]:
    """Per choice: the ids of the prompt and then the choice, and where the choice begins. As in lm-evaluation-harness the choice is what
    prompt and choice together have behind the prompt's own ids."""
    prompt, found = prompt_ids(tokenizer, task, item.prompt), []
    for choice in item.choices:
        rest = _ids(tokenizer, task, item.prompt, choice)[len(prompt) :]
        rest = rest or tokenizer(choice, add_special_tokens=False)["input_ids"]  # a tokenizer that joins the two
        found.append((prompt + rest, len(prompt)))
    return found


def fits(model: PreTrainedModel, tokenizer, task: Task, items: Sequence[Item]) -> list[int]:
    """The items whose prompt and answer have room in the model's positions."""
    room = model.config.max_position_embeddings
    return [
        i for i, item in enumerate(items)
        if len(prompt_ids(tokenizer, task, item.prompt)) + task.max_new_tokens <= room
        and max(len(ids) for ids, _ in _continued(tokenizer, task, item)) <= room
    ]  # fmt: skip


def batches(lengths: Sequence[int], rows: int = BATCH_ROWS, tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Places of equal or similar lengths, longest first: the most memory is needed at once, or never."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        size = max(1, min(rows, tokens // max(1, lengths[order[0]])))
        yield order[:size]
        order = order[size:]


Done = Callable[[list[int]], bool]  # whether the answers to these items are known


def by_generation(
    model: PreTrainedModel, tokenizer, task: Task, items: Sequence[Item], *, rows: int = BATCH_ROWS, known: Done = lambda _: False
) -> Iterator[list[Answer]]:
    """Greedy, in left-padded batches, with the model's own cache; a batch of answers at a time."""
    prompts = [prompt_ids(tokenizer, task, item.prompt) for item in items]
    for batch in batches([len(ids) for ids in prompts], rows):
        if not known(batch):
            written = _generate(model, tokenizer, task, [prompts[i] for i in batch])
            yield [_answer(tokenizer, task, items[i], i, ids) for i, ids in zip(batch, written, strict=True)]


def by_likelihood(
    model: PreTrainedModel, tokenizer, task: Task, items: Sequence[Item], *, rows: int = BATCH_ROWS, known: Done = lambda _: False
) -> Iterator[list[Answer]]:
    """The choice with the largest log p, summed over its tokens, is what the model says."""
    asked = [_continued(tokenizer, task, item) for item in items]
    for batch in batches([max(len(ids) for ids, _ in pairs) for pairs in asked], max(1, rows // 4), BATCH_TOKENS // 4):
        if known(batch):
            continue
        nats = iter(_log_p(model, [pair for i in batch for pair in asked[i]]))
        answers = []
        for i in batch:
            found = tuple(next(nats) for _ in asked[i])
            best = max(range(len(found)), key=found.__getitem__)
            answers.append(Answer(i, best == items[i].gold, items[i].choices[best], nats=found))
        yield answers


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


@torch.no_grad()
def _generate(model: PreTrainedModel, tokenizer, task: Task, prompts: list[list[int]]) -> list[list[int]]:
    longest, pad = max(map(len, prompts)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    stops = StoppingCriteriaList([_Written(tokenizer, task.stop, longest)] if task.stop else [])
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=task.max_new_tokens, do_sample=False, pad_token_id=pad, stopping_criteria=stops
    )
    ends = model.generation_config.eos_token_id
    ends = {pad, *(ends if isinstance(ends, list) else [ends])}
    return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in new[:, longest:].tolist()]


def _answer(tokenizer, task: Task, item: Item, index: int, ids: list[int]) -> Answer:
    text = cut(tokenizer.decode(ids, skip_special_tokens=True), task.stop)
    said = task.parse(text)
    return Answer(index, said == item.answer, said, text, tuple(ids))


@torch.no_grad()
def _log_p(model: PreTrainedModel, pairs: list[tuple[list[int], int]]) -> list[float]:
    """Of the tokens of each row from its place on. Padded on the right, where nothing real can see it."""
    longest = max(len(ids) for ids, _ in pairs)
    rows = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in pairs], device=model.device)
    kept = sorted({at for ids, start in pairs for at in range(start - 1, len(ids) - 1)})
    column, found = {at: n for n, at in enumerate(kept)}, []
    size = max(1, LOGITS // (len(kept) * model.config.get_text_config().vocab_size))
    keep = torch.tensor(kept, device=model.device)
    for part, chunk in zip(rows.split(size), _chunks(pairs, size), strict=True):
        logits = model(part, use_cache=False, logits_to_keep=keep).logits.float()
        logs = logits.gather(2, part[:, keep + 1, None])[..., 0] - logits.logsumexp(-1)
        found += [sum(logs[r, column[at]].item() for at in range(start - 1, len(ids) - 1)) for r, (ids, start) in enumerate(chunk)]
    return found


def _chunks(rows: list, size: int) -> Iterator[list]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]
