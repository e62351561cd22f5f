"""Completions that the teacher itself writes: training data that stay close to what it says.

The teacher draws from its own distribution, and a student that learns its tokens' distributions on these texts learns
the distribution of whole texts (sequence-level distillation, arXiv 1606.07947). Prompts come from a file, or from the
training prompts of the tasks that the teacher can be asked; no held-out example is among them.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from convert.core import json_lines
from convert.core.console import console
from convert.core.errors import UserError
from convert.core.fields import Checked, Range, broken
from convert.core.places import cache_folder
from convert.core.processes import gathered, in_turn, on_first, raise_first, rank
from convert.data.chat import Conversation, chat_tokens, conversations, is_chat
from convert.data.corpus import Corpus, is_held_out
from convert.data.prompts import encode, has_chat_template, leading, rendered
from convert.data.stream import stream
from convert.data.text import Document, TokenData, cached, tokenize, tokenizer_fingerprint
from convert.evaluation.generation import drawn, generate
from convert.evaluation.scoring import BATCH_ROWS, STEP_TOKENS, batches
from convert.evaluation.statistics import writing
from convert.evaluation.tasks import TASKS
from convert.models.loading import Teacher
from convert.models.saving import fingerprint
from convert.models.sharding import is_shared_out

BLOCK = 8  # batches whose prompts are sorted by length together (ours)
HOPELESS = 256  # completions of which at least one must be of use (ours)
PROMPTS = (16, 20_000)  # of each task, at least and at most (ours)


@dataclass(frozen=True)
class Sampling(Checked):
    """How completions are drawn. `loops`: the share of a text's 3-grams that repeat one before, above which the text is
    a loop. `rounds`: how often each prompt is completed at most. All are ours but the temperature, at which a text is
    as likely as the teacher says (Generalized Knowledge Distillation, arXiv 2306.13649)."""

    new_tokens: Annotated[int, Range(1, 100_000)] = 128
    temperature: Annotated[float, Range(0.01, 10)] = 1.0
    loops: Annotated[float, Range(0, 1)] = 0.5
    rounds: Annotated[int, Range(1, 1000)] = 4
    seed: Annotated[int, Range(0, 2**31)] = 0


@dataclass(frozen=True)
class Prompt:
    """Token ids that the teacher goes on from. The key decides the split."""

    key: str
    ids: list[int]


def prepare(source: Corpus, teacher: Teacher, limit: int, seq_len: int) -> TokenData:
    """The tokens of any data: text, conversations, or completions of the teacher, which fit into sequences of `seq_len`
    and give at least `limit` tokens to train on if the prompts do."""
    if source.is_sampled:
        return completions(source, teacher, limit, seq_len, Sampling(min(Sampling.new_tokens, max(1, seq_len // 2))))
    if source.is_streamed:
        return in_turn(lambda: stream(source, teacher.tokenizer, limit))
    if is_chat(source):
        return in_turn(lambda: chat_tokens(source, teacher.tokenizer, limit))
    return in_turn(lambda: tokenize(source, teacher.tokenizer, limit=limit))


def completions(source: Corpus, teacher: Teacher, limit: int, seq_len: int, how: Sampling) -> TokenData:
    """Prompts with what the teacher writes after them, as conversations. Every batch goes to disk when it is written,
    so sampling that was stopped goes on; what is finished is read from the cache of convert.data.text."""
    prompts = _prompts(source, teacher.tokenizer, limit, seq_len, how)
    told = json.dumps([[prompt.ids for prompt in prompts], dataclasses.astuple(how), limit])
    made = f"{fingerprint(teacher.model)} {tokenizer_fingerprint(teacher.tokenizer)} {told} 1"
    name = hashlib.sha256(made.encode()).hexdigest()[:20]
    file = cache_folder() / "completions" / f"{name}.jsonl"
    documents = functools.partial(_documents, file, teacher, prompts, limit, how)
    work = functools.partial(
        cached, f"completions {name}", source.spec, teacher.tokenizer, documents, limit, doing="sample"
    )
    return _led(work, file, teacher, prompts, how) if is_shared_out(teacher.model) else in_turn(work)


def _led(
    work: Callable[[], TokenData], file: Path, teacher: Teacher, prompts: Sequence[Prompt], how: Sampling
) -> TokenData:
    """Let the first process do the work; whenever it samples, all processes, which share the teacher out, do. Each
    returns what is in the cache then. Raises UserError where that is not one cache: none can sample alone."""
    failed: list[Exception] = []
    if rank() == 0:
        try:
            work()
        except Exception as error:
            failed.append(error)
        finally:
            gathered(None)
    else:
        while (told := gathered(None)[0]) is not None:
            _written(teacher, prompts, *told, how)
    on_first(raise_first, failed)
    if len(set(gathered(file.exists()))) > 1:
        raise UserError(
            "Processes that share a teacher out read its completions from one cache; some do not see what the first"
            f" one wrote, {file}. Set CONVERT_CACHE to a folder of a shared disk."
        )
    return work()


# --- prompts


def _prompts(source: Corpus, tokenizer: Any, limit: int, seq_len: int, how: Sampling) -> list[Prompt]:
    """The prompts that leave room for a completion; those of tasks lose what is too far back."""
    longest = seq_len - how.new_tokens
    if not source.files:
        return _task_prompts(tokenizer, limit, longest)
    found = [Prompt(row.key, _ids_of(row, tokenizer)) for row in conversations(source)]
    fitting = [prompt for prompt in found if len(prompt.ids) <= longest]
    if not fitting:
        raise UserError(
            f"A prompt must leave room for a completion; {source.spec} has {len(found):,} prompts, and none of at most"
            f" {longest:,} tokens. Give shorter ones, or a larger --seq-len."
        )
    if len(fitting) < len(found):
        console.print(f"{len(found) - len(fitting):,} of {len(found):,} prompts have more than {longest:,} tokens.")
    return fitting


def _task_prompts(tokenizer: Any, limit: int, longest: int) -> list[Prompt]:
    """Training prompts of every task that this model can be asked, in turns."""
    is_chatty, front = has_chat_template(tokenizer), leading(tokenizer)
    each = min(max(limit // 100, PROMPTS[0]), PROMPTS[1])
    by_task: list[list[Prompt]] = []
    for task in TASKS.values():
        if task.training_prompts is None or (task.chat and not is_chatty):
            continue
        by_task.append([])
        for text in task.training_prompts(each, 0):
            ids = encode(tokenizer, text, chat=task.chat)
            if len(ids) > longest and task.chat:
                continue
            if len(ids) > longest:
                ids = front + ids[len(front) :][-max(1, longest - len(front)) :]
            by_task[-1].append(Prompt(f"{task.name}: {text}", ids))
    return [found[i] for i in range(each) for found in by_task if i < len(found)]


def _ids_of(row: Conversation, tokenizer: Any) -> list[int]:
    if has_chat_template(tokenizer):
        try:
            text = rendered(tokenizer, row.as_dicts, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if row.is_plain:
        return encode(tokenizer, row.messages[0][1])
    raise UserError(
        f"{row.where} has messages, and the teacher has no chat template to render them. Give rows of prompt alone, or"
        " an instruct model as the teacher."
    )


# --- sampling


def _documents(
    file: Path, teacher: Teacher, prompts: Sequence[Prompt], limit: int, how: Sampling
) -> Iterator[list[Document]]:
    """Prompts with their completions, a batch at a time, without the empty ones and the loops."""
    sampled = kept = tokens = 0  # tokens: of those to train on
    with _alone(file):
        known = _known(file, len(prompts), teacher.model.config.vocab_size)
        for turn, places in _batches(prompts, teacher, limit, how):
            if not all((turn, i) in known for i in places):
                rows = _sampled(teacher, prompts, turn, places, how)
                json_lines.append(file, rows)
                known |= {(turn, row["prompt"]): row["ids"] for row in rows}
            documents = []
            for i in places:
                ids, text = known[turn, i], teacher.tokenizer.decode(known[turn, i], skip_special_tokens=True)
                sampled += 1
                if text.strip() and writing([ids])["repetition"] <= how.loops:
                    mask = [False] * len(prompts[i].ids) + [True] * len(ids)
                    documents.append(Document(prompts[i].key, prompts[i].ids + ids, len(text.encode()), mask))
                    tokens += 0 if is_held_out(prompts[i].key) else len(mask)
            kept += len(documents)
            if sampled >= min(HOPELESS, len(prompts) * how.rounds) and not kept:
                raise UserError(
                    f"Completions must be more than silence and loops; none of the {sampled:,} that the teacher wrote"
                    " is. Give other prompts with data=teacher:FILE.jsonl, or another teacher."
                )
            yield documents
    # reached only where the limit was not
    console.print(
        f"The teacher completed every prompt {how.rounds} times: {tokens:,} tokens, fewer than the {limit:,} of the"
        " step, which goes over them more than once.",
        style="yellow",
    )


def _batches(prompts: Sequence[Prompt], teacher: Teacher, limit: int, how: Sampling) -> Iterator[tuple[int, list[int]]]:
    """Round, and places of prompts of similar lengths, in the order of sampling."""
    rows = min(BATCH_ROWS, max(1, limit // how.new_tokens))
    padding = STEP_TOKENS * how.new_tokens if teacher.model.device.type == "cpu" else math.inf
    for turn in range(how.rounds):
        for start in range(0, len(prompts), BLOCK * rows):
            lengths = [len(prompt.ids) for prompt in prompts[start : start + BLOCK * rows]]
            for batch in batches(lengths, rows, padding=padding):
                yield turn, [start + i for i in batch]


def _sampled(
    teacher: Teacher, prompts: Sequence[Prompt], turn: int, places: list[int], how: Sampling
) -> list[dict[str, Any]]:
    """What the teacher writes after these prompts."""
    if is_shared_out(teacher.model):
        gathered((turn, places))  # the others write it, too
    written = _written(teacher, prompts, turn, places, how)
    texts = teacher.tokenizer.batch_decode(written)
    return [
        {"round": turn, "prompt": i, "ids": ids, "text": text}
        for i, ids, text in zip(places, written, texts, strict=True)
    ]


def _written(
    teacher: Teacher, prompts: Sequence[Prompt], turn: int, places: list[int], how: Sampling
) -> list[list[int]]:
    """The completions of a batch. It has random numbers of its own, so that a run that was stopped draws the same."""
    digest = hashlib.sha256(f"{how.seed} {turn} {places}".encode()).digest()
    generator = torch.Generator(teacher.model.device).manual_seed(int.from_bytes(digest[:7]))
    return generate(
        teacher.model,
        teacher.tokenizer,
        [prompts[i].ids for i in places],
        how.new_tokens,
        choose=drawn(how.temperature, generator),
        keep_end=True,
    )


def _known(file: Path, num_prompts: int, vocab_size: int) -> dict[tuple[int, int], list[int]]:
    """(round, place of the prompt) -> completion, of all that was sampled before."""
    json_lines.mend(file)
    found: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(json_lines.read(file), 1):
        turn, place, ids = (row.get(name) for name in ("round", "prompt", "ids"))
        wrong = broken(list[int], ids) or broken(int, turn) or broken(Annotated[int, Range(0, num_prompts - 1)], place)
        if wrong or not all(0 <= i < vocab_size for i in ids or ()):
            raise UserError(f"Line {number} of {file} is no completion that was written there. Remove the file.")
        found[turn, place] = ids  # type: ignore[index, assignment]
    return found


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process samples into the file; a lock goes with its process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            console.print("Another process samples the same completions; this one waits for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
