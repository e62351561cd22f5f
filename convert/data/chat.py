"""Conversations: rows of chat data, checked, and their tokens with a mask of what an assistant wrote.

A row has `messages` (role, content), `conversations` (from, value: ShareGPT) or `prompt` and `completion`; other
columns are ignored. Roles are an optional system message, then user and assistant in turns.

The mask follows one rule. Where the chat template marks what is generated, its marks decide, and a marked text without
a special token takes in the special token right behind it. Elsewhere the turn of an assistant is what the template adds
to the prompt before it, and the mask covers its tokens up to the last special one, which ends the turn; a line break
behind that is no part of it. A token that begins in the prompt belongs to the prompt. Where the template shows earlier
turns otherwise than it let the assistant begin them (Qwen3 drops thoughts), each turn becomes a document of its own:
its prompt as generation sees it, and the answer.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import shown
from convert.data.corpus import Corpus, check_characters
from convert.data.prompts import has_chat_template, in_template, leading, rendered
from convert.data.text import Document, TokenData, cached, tokenizer_fingerprint

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
KINDS = "messages, conversations, or prompt and completion"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = tuple[tuple[str, str], ...]  # role, content
Marked = tuple[list[int], list[bool]]  # token ids, and whether an assistant wrote each


@dataclass(frozen=True)
class Conversation:
    """Messages of a row. `is_plain`: a prompt and its completion, which need no chat template."""

    key: str
    where: str
    messages: Messages
    is_plain: bool

    @property
    def as_dicts(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]


def is_chat(source: Corpus) -> bool:
    """Whether the first row of the data is a conversation. Raises UserError where files of text lie beside it."""
    first = next(source.rows(), None)
    if first is None or not isinstance(first[2], dict) or _kind(first[2]) is None:
        return False
    if other := next((file for file in source.files if file.suffix != ".jsonl"), None):
        raise UserError(
            f"Conversations and text cannot be one data set; {source.spec} begins with a row of {_kind(first[2])} and"
            f" has {other.name}. Move the .jsonl files to a folder of their own."
        )
    return True


def check(source: Corpus, masking: str) -> None:
    """Raises UserError where a training step with this masking cannot use the data. Every row of a file is looked at;
    hub data sets are not asked yet."""
    if source.hub or (source.is_sampled and not source.files):
        return
    if source.is_sampled or is_chat(source):
        if not sum(1 for _ in conversations(source)):  # all are looked at
            raise UserError(f"The data {source.spec!r} hold no conversation. Give some.")
    else:
        check_masking(False, masking, source.spec)


def check_masking(has_completions: bool, masking: str, name: str) -> None:
    """Raises UserError where only completions are to be learnt from text that has none."""
    if masking == "completions" and not has_completions:
        raise UserError(
            f"masking=completions needs conversations; {name} does not begin with a row of {KINDS}. Set masking=all for"
            " plain text; for prompts that the teacher completes, data=teacher:FILE.jsonl."
        )


def conversations(source: Corpus) -> Iterator[Conversation]:
    """The conversations of the data, or the prompts where the teacher will complete them. A wrong row of a file is
    refused with its line; one of a hub data set, which its reader cannot mend, is left out and counted."""
    left_out, last = 0, ""
    for key, where, row in source.rows():
        try:
            yield _prompt(key, where, row) if source.is_sampled else _conversation(key, where, row)
        except UserError as error:
            if not source.hub:
                raise
            left_out, last = left_out + 1, str(error)
    if left_out:
        print(f"{left_out:,} rows of {source.spec} are no conversations and were left out. The last one: {last}")


def _kind(row: dict[str, Any]) -> str | None:
    if row.get("messages") is not None:
        return "messages"
    if row.get("conversations") is not None:
        return "conversations"
    return "prompt and completion" if "prompt" in row and "completion" in row else None


def _conversation(key: str, where: str, row: Any) -> Conversation:
    """A row of training data. Raises UserError for all that it must not be."""
    kind = _kind(row) if isinstance(row, dict) else None
    if kind is None:
        raise UserError(f"{where} must be an object with {KINDS}; mend or remove it.")
    if kind == "prompt and completion":
        prompt, completion = (_text(row[name], f"{where}: the {name}") for name in ("prompt", "completion"))
        messages: Messages = (("user", prompt), ("assistant", completion))
    else:
        messages = _messages(row[kind], where)
    _check_order(messages, where)
    if not any(role == "assistant" for role, _ in messages):
        raise UserError(f"{where} has no turn of an assistant, so nothing to learn; add one or remove the row.")
    if any(role == "assistant" and not content.strip() for role, content in messages):
        raise UserError(f"{where} has an empty completion; fill it in or remove the row.")
    return Conversation(key, where, messages, kind == "prompt and completion")


def _prompt(key: str, where: str, row: Any) -> Conversation:
    """A row whose last message the teacher answers; a last answer that the row has is dropped."""
    if isinstance(row, dict) and _kind(row) in ("messages", "conversations"):
        messages = _messages(row[_kind(row)], where)
        _check_order(messages, where)
        messages = messages[:-1] if messages[-1][0] == "assistant" else messages
        if messages[-1:] and messages[-1][0] == "user":
            return Conversation(key, where, messages, is_plain=False)
        raise UserError(f"{where} has no message of a user to answer; add one or remove the row.")
    text = _text(row.get("prompt") if isinstance(row, dict) else row, f"{where}: the prompt")
    if not text.strip():
        raise UserError(f"{where} has an empty prompt; fill it in or remove the row.")
    return Conversation(key, where, (("user", text),), is_plain=True)


def _messages(found: Any, where: str) -> Messages:
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise UserError(f"{where} must have a list of messages, each with role and content; mend or remove it.")
    messages = []
    for number, message in enumerate(found, 1):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(
                f"{where}: message {number} has the role {shown(role)}; roles are {', '.join(ROLES)}. Remove the row."
            )
        messages.append((ROLES[role], _text(content, f"{where}: message {number}")))
    return tuple(messages)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where} must be text, and is {shown(text)}; mend or remove it.")
    check_characters(text, where)
    return text


def _check_order(messages: Messages, where: str) -> None:
    roles = [role for role, _ in messages]
    first = int(roles[:1] == ["system"])
    for number, role in enumerate(roles[first:]):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise UserError(
                f"{where} has its roles out of order: message {first + number + 1} is by the {role}, and the {wanted}"
                " is next. An optional system message comes first, then user and assistant in turns."
            )


# --- tokens


def chat_tokens(source: Corpus, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> TokenData:
    """Tokens of the conversations with their masks, in the cache of convert.data.text. `limit` ends a hub stream."""
    limit = limit if source.hub else None
    template = hashlib.sha256(repr(tokenizer.chat_template).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    key = f"chat {source.fingerprint()} {tokenizer_fingerprint(tokenizer)} {template} {limit} 1"
    return cached(key, source.spec, tokenizer, lambda: _documents(source, tokenizer), limit)


def _documents(source: Corpus, tokenizer: Any) -> Iterator[list[Document]]:
    for conversation in conversations(source):
        size = sum(len(content.encode()) for _, content in conversation.messages)
        found = marked(tokenizer, conversation)
        # the turns of one conversation stay in one split
        yield [Document(conversation.key, ids, size * (i == 0), mask) for i, (ids, mask) in enumerate(found)]


def marked(tokenizer: Any, conversation: Conversation) -> list[Marked]:
    """The tokens of a conversation and which of them an assistant wrote: one document, or one for each answer. Raises
    UserError where the tokenizer has no chat template that tells."""
    if not has_chat_template(tokenizer):
        if conversation.is_plain:
            return [_concatenated(tokenizer, conversation)]
        raise UserError(
            f"{conversation.where} has messages, and the teacher has no chat template to render them. Give rows of"
            " prompt and completion, or an instruct model as the teacher."
        )
    try:
        found = _by_marks(tokenizer, conversation) if _has_marks(tokenizer) else _by_prefixes(tokenizer, conversation)
    except UserError as error:
        raise UserError(f"{conversation.where}: {error}") from error
    if not all(any(mask) for _, mask in found):
        raise UserError(
            f"{conversation.where}: the chat template gives an answer no token of its own. Correct chat_template in"
            " tokenizer_config.json, or remove the row."
        )
    return found


def _concatenated(tokenizer: Any, conversation: Conversation) -> Marked:
    """A prompt and its completion as one text, ended by the end token, which belongs to the completion."""
    (_, prompt), (_, completion) = conversation.messages
    found = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
    front, ids = leading(tokenizer), found["input_ids"]
    mask = [start >= len(prompt) for start, _ in found["offset_mapping"]]
    if ids[-1:] != [tokenizer.eos_token_id]:  # a completion may bring its own
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return front + ids, [False] * len(front) + mask


def _has_marks(tokenizer: Any) -> bool:
    try:
        return MARKS.search(tokenizer.get_chat_template()) is not None
    except (ValueError, TypeError):  # rendering says what is wrong with it
        return False


def _by_marks(tokenizer: Any, conversation: Conversation) -> list[Marked]:
    found = in_template(
        tokenizer, conversation.as_dicts, return_dict=True, return_assistant_tokens_mask=True, enable_thinking=False
    )
    ids, mask, special = found["input_ids"], [bool(m) for m in found["assistant_masks"]], special_ids(tokenizer)
    has_end = False  # whether the marked text so far has a special token
    for i, token in enumerate(ids):
        follows = i > 0 and mask[i - 1]
        mask[i] = mask[i] or (follows and not has_end and token in special)
        has_end = mask[i] and ((follows and has_end) or token in special)
    return [(ids, mask)]


def _by_prefixes(tokenizer: Any, conversation: Conversation) -> list[Marked]:
    messages = conversation.as_dicts
    whole = rendered(tokenizer, messages, add_generation_prompt=False)
    turns: list[tuple[str, int]] = []  # the text up to the end of an answer, and where the answer begins
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        text = rendered(tokenizer, messages[: i + 1], add_generation_prompt=False) if i + 1 < len(messages) else whole
        prompts = (  # of an answer at once, or of one with a thought before it
            rendered(tokenizer, messages[:i], add_generation_prompt=True, enable_thinking=thinks)
            for thinks in (False, True)
        )
        before = next((prompt for prompt in prompts if text.startswith(prompt)), None)
        if before is None:
            raise UserError(
                "the chat template must begin an answer as its generation prompt does; this one does not, so nothing"
                " tells the answer from its prompt. Give it {% generation %} marks."
            )
        turns.append((text, len(before)))
    if all(whole.startswith(text) for text, _ in turns):
        return [_of_spans(tokenizer, whole, [(start, len(text)) for text, start in turns])]
    return [_of_spans(tokenizer, text, [(start, len(text))]) for text, start in turns]


def _of_spans(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Marked:
    """The tokens of a text; marked are those that begin in a span, up to its last special token if it has one."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts, special = found["input_ids"], [start for start, _ in found["offset_mapping"]], special_ids(tokenizer)
    mask = [False] * len(ids)
    for first, end in spans:
        inside = [i for i, start in enumerate(starts) if first <= start < end]
        last = max((i for i in inside if ids[i] in special), default=inside[-1] if inside else -1)
        for i in inside:
            mask[i] = i <= last
    return ids, mask


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that stand for no text: ends of turns and the like."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)
