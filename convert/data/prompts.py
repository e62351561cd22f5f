"""Prompts as token ids: the one way in which a text becomes what a model continues."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from convert.core.errors import UserError

LONGEST = 1_000_000  # characters of a message in its chat template (ours)
RENDER_SECONDS = 5.0  # that a chat template may take for one message (ours)
RENDER_BYTES = 1 << 30  # of memory, likewise (ours)


def encode(tokenizer: Any, prompt: str, continuation: str = "", *, chat: bool = False) -> list[int]:
    """The ids of a prompt and what follows it. `chat`: the prompt is a user's message, told in the chat template, which
    brings its own special tokens. Otherwise the tokenizer's special tokens stand in front, where it puts any; never
    behind, where they would end the text."""
    try:
        if chat:
            return tokenizer(chat_text(tokenizer, prompt) + continuation, add_special_tokens=False)["input_ids"]
        return leading(tokenizer) + tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    except (UnicodeError, TypeError) as error:  # fast tokenizers call half a surrogate pair a wrong type
        raise UserError(
            f"A prompt must be text that UTF-8 can hold; {prompt[:40]!a} is not ({error}). Correct it."
        ) from None


def leading(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model is one to talk to. An empty template is none."""
    return bool(tokenizer.chat_template)


def chat_text(tokenizer: Any, message: str) -> str:
    """A user's message in the chat template, up to where the answer begins."""
    return rendered(tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True)


def rendered(
    tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool, enable_thinking: bool = False
) -> str:
    """Messages in the chat template, up to where an answer begins if `add_generation_prompt`. Models that can think
    first are asked not to: a short answer would end inside the thought."""
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
    text = in_template(tokenizer, messages, tokenize=False, **options)
    longest = LONGEST + sum(len(message["content"]) for message in messages)
    if not isinstance(text, str) or not text.strip() or len(text) > longest:
        found = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
        raise UserError(
            f"The chat template must render a message as text; this tokenizer's gives {found}. Correct chat_template in"
            " tokenizer_config.json (or chat_template.jinja), or remove it."
        )
    return text


def in_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """What apply_chat_template makes of the messages within limits of time and memory."""
    try:
        with _seconds(RENDER_SECONDS), _memory(RENDER_BYTES):
            return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a stranger's program: whatever it does wrong is its own fault
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"The chat template must render a message; this tokenizer's ends with {type(error).__name__}: {reason}."
            " Correct chat_template in tokenizer_config.json (or chat_template.jinja), or remove it."
        ) from error


@contextmanager
def _memory(more: int) -> Iterator[None]:
    """Raises MemoryError in here where so many bytes more are taken than the process has. On Linux alone."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource  # Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _seconds(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in here after so many seconds. In the main thread alone: others get no signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it does not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def left_padded(prompts: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T] of prompts that all end at T."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
