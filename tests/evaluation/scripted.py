"""Models that answer as a test wants: an oracle, one that always answers A, one that ranks well and writes rubbish."""

from collections.abc import Callable

import torch
from transformers import GenerationMixin, GPTNeoXConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from convert.evaluation.scoring import prompt_ids
from convert.evaluation.tasks import Item, Task
from convert.models.cache import CACHE_NAME
from convert.models.catalog import NANO
from convert.models.loading import load_teacher


class Rows:
    """A cache that is the rows themselves."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def batch_select_indices(self, indices) -> None:
        self.rows = [self.rows[i] for i in indices.tolist()]


class Scripted(PreTrainedModel, GenerationMixin):
    """After a row of ids the next token is `script(ids, is_writing)`, for certain."""

    config_class = GPTNeoXConfig

    def __init__(self, script: Callable[[list[int], bool], int], vocab_size: int):
        super().__init__(GPTNeoXConfig(vocab_size=vocab_size, num_hidden_layers=1, eos_token_id=0, use_cache=False))
        self.script = script
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids, attention_mask=None, past_key_values=None, cache=None, use_cache=False, logits_to_keep=0, **_
    ):
        """With a mask it writes, without one it is scored by likelihood."""
        past_key_values = cache or past_key_values
        before = past_key_values.rows if past_key_values else [[]] * len(input_ids)
        rows = [old + new for old, new in zip(before, input_ids.tolist(), strict=True)]
        columns = range(input_ids.shape[1])[-logits_to_keep:]
        logits = torch.full((len(rows), len(columns), self.config.vocab_size), -9.0)
        for row, (old, ids) in enumerate(zip(before, rows, strict=True)):
            mask = [1] * len(ids) if attention_mask is None else attention_mask[row].tolist()
            for column, at in enumerate(columns):
                seen = [token for token, real in zip(ids[: len(old) + at + 1], mask, strict=False) if real]
                logits[row, column, self.script(seen, attention_mask is not None)] = 9.0
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: Rows(rows) if use_cache else None})


def chatty_tokenizer():
    """neox-nano's, with a template."""
    tokenizer = load_teacher(str(NANO)).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    return tokenizer


def knowing(tokenizer, examples: list[tuple[Task, list[Item]]]) -> Callable[[list[int]], int]:
    """The next token of the right answer to whichever prompt the ids begin with; the end where there is none."""
    known = {}
    for task, items in examples:
        for item in items:
            prompt = prompt_ids(tokenizer, task, item.prompt)
            known[tuple(prompt)] = prompt + tokenizer(item.choices[item.gold], add_special_tokens=False)["input_ids"]

    def next_token(ids: list[int]) -> int:
        for prompt, whole in known.items():
            if len(whole) > len(ids) >= len(prompt) and whole[: len(ids)] == ids:
                return whole[len(ids)]
        return 0

    return next_token
