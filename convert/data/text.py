"""Turning text into tokens, once, in a cache."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import Range, checked
from convert.data import array_cache
from convert.data.corpus import HELD_OUT_SHARE, Corpus, is_held_out
from convert.data.prompts import leading

if TYPE_CHECKING:
    from convert.data.stream import Stream

PARTS = ("train", "held_out")
GROUP = 64  # documents


class Document(NamedTuple):
    """A document as token ids. The key decides its split; `completions` says of each token whether an assistant wrote
    it (None: plain text)."""

    key: str
    ids: list[int]
    text_bytes: int
    completions: list[bool] | None = None


@dataclass(frozen=True)
class Tokens:
    """Token ids of whole documents, one after another. `starts`: where each begins. `completions`: whether an assistant
    wrote the token; None of plain text."""

    ids: np.ndarray
    starts: np.ndarray
    completions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def of_epoch(self, epoch: int) -> "Tokens":
        """What an epoch trains on: always all of it."""
        return self


@dataclass(frozen=True)
class TokenData:
    train: "Tokens | Stream"
    held_out: Tokens
    fingerprint: str
    text_bytes: int


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of what decides the ids: the serialised tokenizer, without the padding and truncation of its last
    call, and the end token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hashlib.sha256(json.dumps([state, tokenizer.eos_token_id]).encode()).hexdigest()[:16]


@checked
def tokenize(
    source: Corpus, tokenizer: PreTrainedTokenizerBase, limit: Annotated[int, Range(1, 1e14)] | None = None
) -> TokenData:
    """Tokenise once into a memory-mapped cache; later calls read it. `limit` stops a hub data set after so many tokens
    for training; one that is streamed goes on until a document is held out.

    A damaged cache is set aside and rebuilt."""
    limit = limit if source.hub else None
    key = f"{source.fingerprint()} {tokenizer_fingerprint(tokenizer)} {limit} 2"
    if limit and source.is_streamed:
        return cached(key, source.spec, tokenizer, lambda: _beginning(_documents(source, tokenizer), limit))
    return cached(key, source.spec, tokenizer, lambda: _documents(source, tokenizer), limit)


def _beginning(groups: Iterator[list[Document]], limit: int) -> Iterator[list[Document]]:
    """Groups of documents up to so many tokens for training, and until one document is held out."""
    found = {True: 0, False: 0}
    for group in groups:
        yield group
        for document in group:
            found[is_held_out(document.key)] += len(document.ids)
        if found[False] >= limit and found[True]:
            return


def _documents(source: Corpus, tokenizer: Any) -> Iterator[list[Document]]:
    """Documents in groups that are tokenised at once, each ended by the end token."""
    front, group = leading(tokenizer), []
    for key, text in source.documents():
        group.append((key, text))
        if len(group) == GROUP:
            yield tokenized(group, tokenizer, front)
            group = []
    if group:
        yield tokenized(group, tokenizer, front)


def tokenized(group: list[tuple[str, str]], tokenizer: Any, front: list[int]) -> list[Document]:
    """The documents of (key, text) pairs, which begin with the ids `front` and end with the end token."""
    found = tokenizer([text for _, text in group], verbose=False, add_special_tokens=False)["input_ids"]
    documents = []
    for (key, text), ids in zip(group, found, strict=True):
        ids = front + ids
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = ids + [tokenizer.eos_token_id]
        documents.append(Document(key, ids, len(text.encode())))
    return documents


def cached(
    key: str,
    name: str,
    tokenizer: Any,
    documents: Callable[[], Iterator[list[Document]]],
    limit: int | None = None,
    *,
    doing: str = "tokenise",
) -> TokenData:
    """The documents as arrays on disk, which are written once for this key and then read. `limit`: tokens for training
    after which no more groups of documents are taken; `name` is what the data are called, `doing` the progress bar.

    A damaged cache is set aside and written anew."""
    key = hashlib.sha256(key.encode()).hexdigest()[:20]
    folder, meta = array_cache.kept(
        "tokens", key, lambda folder: _write_cache(name, tokenizer, documents(), limit, folder, doing)
    )
    train, held_out = (
        Tokens(
            np.load(folder / f"{part}.npy", mmap_mode="r"),
            np.load(folder / f"{part}_starts.npy"),
            np.load(folder / f"{part}_completions.npy") if f"{part}_completions" in meta["sha256"] else None,
        )
        for part in PARTS
    )
    return TokenData(train, held_out, fingerprint=key, text_bytes=meta["text_bytes"])


def _write_cache(
    name: str, tokenizer: Any, documents: Iterator[list[Document]], limit: int | None, folder: Path, doing: str
) -> dict[str, Any]:
    """Tokens go to disk as they come: a data set may be larger than the memory."""
    dtype = id_type(tokenizer)
    starts, text_bytes = _write_raw(documents, limit, folder, dtype, doing)
    if not text_bytes:
        raise UserError(f"The data {name!r} holds no text.")
    raw = {part: _raw(folder / part, dtype, ends) for part, ends in starts.items()}
    for part, tokens in zip(PARTS, _split(raw["train"], raw["held_out"], name), strict=True):
        np.save(folder / f"{part}.npy", tokens.ids)
        np.save(folder / f"{part}_starts.npy", tokens.starts)
        if tokens.completions is not None:
            np.save(folder / f"{part}_completions.npy", tokens.completions)
    for file in folder.iterdir():
        if not file.suffix:
            file.unlink()
    return {"source": name, "text_bytes": text_bytes}


def id_type(tokenizer: Any) -> type:
    """The type in which ids are kept. They may be larger than their number."""
    return np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32


def _raw(file: Path, dtype: type, ends: list[int]) -> Tokens:
    """What _write_raw has written."""
    ids = np.memmap(file, dtype, "r") if ends[-1] else np.empty(0, dtype)
    completions = np.fromfile(f"{file}_completions", bool)
    return Tokens(ids, np.array(ends[:-1]), completions if len(completions) == len(ids) else None)


def _split(train: Tokens, held_out: Tokens, name: str) -> tuple[Tokens, Tokens]:
    """Both parts as they are or, where too few documents leave one empty, the last sixteenth of the tokens held out: of
    conversations, whole ones."""
    if len(train) and len(held_out):
        return train, held_out
    whole = train if len(train) else held_out
    cut = int(len(whole) * (1 - HELD_OUT_SHARE))
    if whole.completions is None:
        later = np.concatenate([[0], whole.starts[whole.starts > cut] - cut])
        return Tokens(whole.ids[:cut], whole.starts[whole.starts < cut]), Tokens(whole.ids[cut:], later)
    if len(whole.starts) < 2:
        raise UserError(f"Conversations must be two or more, one of them held out; {name!r} has one. Give more.")
    first = min(max(1, int(np.searchsorted(whole.starts, cut))), len(whole.starts) - 1)
    cut = int(whole.starts[first])
    return (
        Tokens(whole.ids[:cut], whole.starts[:first], whole.completions[:cut]),
        Tokens(whole.ids[cut:], whole.starts[first:] - cut, whole.completions[cut:]),
    )


def _write_raw(
    documents: Iterator[list[Document]], limit: int | None, aside: Path, dtype: type, doing: str
) -> tuple[dict[str, list[int]], int]:
    """Write files `train` and `held_out` of bare ids, and of conversations who wrote them; return where their documents
    start and where the last one ends, and the bytes of text read."""
    starts, text_bytes = {part: [0] for part in PARTS}, 0
    with ExitStack() as stack:
        files, masks = (
            {part: stack.enter_context((aside / f"{part}{end}").open("wb")) for part in PARTS}
            for end in ("", "_completions")
        )
        bar = stack.enter_context(tqdm(total=limit, unit="tok", unit_scale=True, desc=doing, delay=3))
        for group in documents:
            for key, ids, size, completions in group:
                part = "held_out" if is_held_out(key) else "train"
                files[part].write(np.array(ids, dtype).tobytes())
                masks[part].write(np.array(completions or (), bool).tobytes())
                starts[part].append(starts[part][-1] + len(ids))
                text_bytes += size
                bar.update(len(ids))
            if limit and starts["train"][-1] >= limit:
                break
    return starts, text_bytes
