"""Decoding: the one loop by which models write text here, greedily or drawn, with their own cache.

T tokens of a prompt · B prompts of a batch
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from convert.core.processes import first_says
from convert.data.prompts import encode, left_padded
from convert.models.cache import CACHE_NAME
from convert.models.sharding import is_shared_out

PREFILL_CHUNK = 2048  # tokens of a prompt in one forward pass


class Streamer(Protocol):
    """What receives token ids as they are written: transformers' TextStreamer is one."""

    def put(self, value: Tensor) -> None:
        """Take the ids of the prompt, then of each token."""

    def end(self) -> None:
        """Take note that the text is complete."""


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Run the model over prompts [B, T]: the logits [B, 1, vocabulary] after their last tokens, and the cache.

    `mask` [B, T] is 0 at padding on the left. Long prompts go in pieces, so that they need no more memory than their
    cache."""
    done = 0
    for piece in ids.split(PREFILL_CHUNK, 1):
        done += piece.shape[1]
        out = model(
            piece,
            use_cache=True,
            logits_to_keep=1,
            **_padding(model, mask, piece.shape[1], done),
            **{CACHE_NAME: cache},
        )
        cache = out[CACHE_NAME]
    return out.logits, cache


def _padding(model: PreTrainedModel, mask: Tensor | None, count: int, done: int) -> dict[str, Tensor]:
    """The arguments that tell the model of padding among the first `done` tokens, of which this call has the last
    `count`."""
    if mask is None:
        return {}
    found = {"attention_mask": mask[:, :done]}
    if "position_ids" in inspect.signature(model.forward).parameters:
        found["position_ids"] = (mask[:, :done].cumsum(1) - 1).clamp(min=0)[:, -count:]
    return found


@torch.no_grad()
def steps(
    model: PreTrainedModel,
    logits: Tensor,
    cache: Cache,
    mask: Tensor | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode from the logits and the cache of a prefill, without end: the next tokens [B, 1], and the logits [B, 1,
    vocabulary] that they were chosen from. A step is run only when its token is asked for. `choose`: logits [B,
    vocabulary] to tokens [B]; the likeliest token by default."""
    while True:
        last = logits[:, -1]
        token = (last.argmax(-1) if choose is None else choose(last.float()))[:, None]
        yield token, logits
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        told = _padding(model, mask, 1, 0 if mask is None else mask.shape[1])
        out = model(token, use_cache=True, **told, **{CACHE_NAME: cache})
        logits, cache = out.logits, out[CACHE_NAME]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    stop: Callable[[str], bool] | None = None,
    choose: Callable[[Tensor], Tensor] | None = None,
    streamer: Streamer | None = None,
    keep_end: bool = False,
) -> list[list[int]]:
    """What the model writes after each of these prompts (token ids), in one left-padded batch, up to the first token
    that ends a text; that token is left out unless `keep_end`.

    `stop`: whether a text so far is complete. `choose`: as in `steps`; greedy by default. The settings published with a
    model (beams, penalties, watermarks) play no part: a penalty for repetition would punish copying."""
    pad, ends = tokenizer.pad_token_id, end_ids(model, tokenizer)
    ids, mask = left_padded(prompts, pad, model.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    written = ids.new_zeros(len(prompts), 0)
    is_done = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
    agrees = is_shared_out(model)  # else each process writes on its own, or alone
    for token, _ in steps(model, *prefill(model, ids, mask), mask, choose):
        token = token.masked_fill(is_done[:, None], pad)  # a row that ended says nothing while others go on
        written = torch.cat([written, token], 1)
        if streamer is not None:
            streamer.put(token[:, 0].cpu())
        is_done |= torch.isin(token[:, 0], token.new_tensor(ends))
        if stop is not None:
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            is_done |= torch.tensor([stop(text) for text in texts], device=ids.device)
        done = bool(is_done.all())
        if written.shape[1] == max_new_tokens or (first_says(done) if agrees else done):
            break
    if streamer is not None:
        streamer.end()
    last = {pad, *ends}
    lengths = [next((n for n, token in enumerate(row) if token in last), len(row)) for row in written.tolist()]
    return [row[: n + 1 if keep_end else n] for n, row in zip(lengths, written.tolist(), strict=True)]


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int = 48
) -> list[str]:
    """Greedy continuations of these texts."""
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    return tokenizer.batch_decode(generate(model, tokenizer, ids, new_tokens), skip_special_tokens=True)


def drawn(temperature: float, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """Tokens drawn from all of the vocabulary at this temperature (above 0), for `choose`. `generator`: of the random
    numbers; torch's own by default."""

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]

    return choose


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a text: those of the model's generation settings, and the tokenizer's."""
    its_own = model.generation_config.eos_token_id
    return sorted({*(its_own if isinstance(its_own, list) else [its_own]), tokenizer.eos_token_id} - {None})


@contextmanager
def plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """Take away what a model's generation settings add to greedy search, for code that calls its `generate()`."""
    its_own: Any = model.generation_config
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
