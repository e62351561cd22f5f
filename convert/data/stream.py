"""Text that is read while it is trained on, for a corpus that does not fit on a disk: its tokens in chunks.

CACHE/streams/KEY/000012-3.npz    chunk 12 of part 3: token ids, and where documents begin
CACHE/streams/KEY/000012-3.json   where part 3 stands in its files before that chunk
CACHE/streams/KEY/3.lock          who works on part 3

The files of a data set are dealt to a few parts, and a chunk has equally many tokens of each. What is in it depends on
the data and its number alone, so a batch is a function of (seed, step) however many processes there are, and whichever
of them made it. Chunks that were read are removed, but for the last three; places stay, so that any chunk can be made
again.
"""

import fcntl
import hashlib
import json
import math
import threading
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, unsealed, write_json
from convert.core.places import cache_folder
from convert.core.processes import rank, world
from convert.data.corpus import Corpus, is_held_out, text_of
from convert.data.hub import hub_data, hub_files
from convert.data.prompts import leading
from convert.data.text import GROUP, TokenData, Tokens, id_type, tokenize, tokenized, tokenizer_fingerprint

CHUNK = 1 << 22  # tokens at most (ours)
MOST_PARTS = 8  # processes that read at once (ours)
HEAD = 1 << 22  # tokens at the beginning of the data, among which held-out documents are looked for, at most (ours)
AGAIN = "Without network a run waits for it: the same command goes on. Or give --data stdlib, or --data FOLDER."

Place = dict[str, Any] | None  # where a part stands in its files, as `datasets` says it; None: at the beginning
Documents = Iterator[tuple[list[int], Place]]  # the ids of each, and the place behind it


class Stream:
    """The tokens of a streamed data set, in chunks of about so many `tokens`."""

    completions: None = None  # a stream is of text

    def __init__(self, source: Corpus, tokenizer: Any, tokens: int) -> None:
        assert source.hub is not None
        self.name, self.config = source.hub
        self.tokenizer = tokenizer
        with hub_data(self.name, self.config, AGAIN, split="train") as rows:
            self.num_parts = math.gcd(rows.num_shards, MOST_PARTS)  # of equally many files: none is read twice
        self.of_part = tokens // self.num_parts
        files = hub_files(self.name, self.config, AGAIN)
        about = [source.hub, files, tokenizer_fingerprint(tokenizer), self.num_parts, self.of_part, 1]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
        self.folder = cache_folder() / "streams" / self.fingerprint
        self._coming: dict[int, Future[Tokens]] = {}
        self._one_at_a_time = threading.Lock()  # of the threads that read and make chunks
        self._open: dict[int, tuple[int, Documents]] = {}  # part -> the chunk that its next document begins
        self._last = -1

    def __len__(self) -> int:
        return self.of_part * self.num_parts

    def of_epoch(self, epoch: int) -> Tokens:
        """What an epoch trains on: one chunk. Raises UserError where the data cannot be read."""
        for other in [other for other in self._coming if not epoch <= other <= epoch + 1]:
            del self._coming[other]
        return self.begin(epoch).result()

    def begin(self, chunk: int) -> "Future[Tokens]":
        """Begin to read or make a chunk, unless that was begun. A process that ends does not wait for it. What failed
        is tried again."""
        known = self._coming.get(chunk)
        if known is None or (known.done() and known.exception() is not None):
            coming = self._coming[chunk] = Future[Tokens]()

            def work() -> None:
                try:
                    with self._one_at_a_time:
                        coming.set_result(self._chunk(chunk))
                except BaseException as error:
                    coming.set_exception(error)

            threading.Thread(target=work, name="stream", daemon=True).start()
        return self._coming[chunk]

    def position(self, chunk: int) -> dict[str, Any]:
        """The place of every part before a chunk, which a checkpoint keeps for a machine whose cache lacks it. Every
        chunk before it was made."""
        places = [self._noted(part, chunk) for part in range(self.num_parts)]
        return {"of": self.fingerprint, "chunk": chunk, "places": places}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Go on from a position. Raises UserError where it is one of other data."""
        if position["of"] != self.fingerprint:
            raise UserError(
                "A run goes on with the data that it began with; the streamed data set has other files now, or another"
                " tokenizer. Start again with --fresh."
            )
        for part, place in enumerate(position["places"]):
            with self._alone(part):
                self._note(part, position["chunk"], place)

    # --- a chunk; what follows runs in one thread at a time

    def _chunk(self, number: int) -> Tokens:
        """The chunk as it is in the cache, where what is missing is made. Each process begins with other parts."""
        first = rank() * self.num_parts // world()
        parts = [i % self.num_parts for i in range(first, first + self.num_parts)]
        bar = tqdm(parts, desc="tokenise", unit="part", delay=3, disable=number > 0 or rank() > 0)
        read = {part: self._part(part, number) for part in bar}
        for part in range(self.num_parts):
            self._file(part, self._last - 2, "npz").unlink(missing_ok=True)
        self._last = number
        starts = [read[part][1] + part * self.of_part for part in range(self.num_parts)]
        return Tokens(np.concatenate([read[part][0] for part in range(self.num_parts)]), np.concatenate(starts))

    def _part(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and where documents begin, of a part of a chunk; another process that is making it is waited for."""
        with self._alone(part):
            return self._read(part, number) or self._made(part, number)

    @contextmanager
    def _alone(self, part: int) -> Iterator[None]:
        """Let no other process work on a part; a lock goes with its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{part}.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What is in the cache, None where that is nothing, or is damaged."""
        try:
            with self._file(part, number, "npz").open("rb") as opened, np.load(opened) as found:  # it has checksums
                ids, starts = found["ids"], found["starts"]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            return None
        return (ids, starts) if len(ids) == self.of_part else None

    def _made(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Make a part of a chunk, from where the one before ended or from the nearest place before it that is known."""
        first, documents = self._open.pop(part, (-1, iter(())))
        if first != number:
            first = number
            while first and self._noted(part, first) is None:
                first -= 1
            documents = self._documents(part, self._noted(part, first))
        try:
            for chunk in range(first, number + 1):
                ids, starts, place = _taken(documents, self.of_part)
                self._note(part, chunk + 1, place)
            made: tuple[np.ndarray, np.ndarray] = np.array(ids, id_type(self.tokenizer)), np.array(starts)
            self._write(part, number, *made)
        except OSError as error:
            raise UserError(
                f"Chunks of a stream must be cached, and {self.folder} cannot take them ({error}). Free some space, or"
                " set CONVERT_CACHE."
            ) from error
        self._open[part] = number + 1, documents
        return made

    def _write(self, part: int, number: int, ids: np.ndarray, starts: np.ndarray) -> None:
        """Write a part of a chunk, whole or not at all."""
        for left in self.folder.glob(f"*-{part}.npz.writing"):  # of a process that was killed
            left.unlink()
        file = self._file(part, number, "npz")
        aside = file.with_name(f"{file.name}.writing")
        try:
            with aside.open("wb") as opened:
                np.savez(opened, ids=ids, starts=starts)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def _noted(self, part: int, chunk: int) -> Place:
        """The place of a part before a chunk; None before the first one, and where nothing sound tells it."""
        file = self._file(part, chunk, "json")
        try:
            return dict(unsealed(parse_json(file.read_bytes(), str(file)))["place"])
        except (OSError, ValueError, LookupError, TypeError, UserError):
            return None

    def _note(self, part: int, chunk: int, place: Place) -> None:
        if place is not None:
            write_json(self._file(part, chunk, "json"), sealed({"place": place}))

    def _documents(self, part: int, place: Place) -> Documents:
        """The documents of a part without those that are held out, again and again."""
        front, is_whole = leading(self.tokenizer), place is None
        with hub_data(self.name, self.config, AGAIN, split="train") as data:
            from datasets.distributed import split_dataset_by_node

            while True:
                rows, num_documents = split_dataset_by_node(data, part, self.num_parts), 0
                if place is not None:
                    rows.load_state_dict(place)
                for group in _groups(rows, self.name):
                    num_documents += len(group)
                    texts = [("", text) for text, _ in group]
                    for (_, behind), document in zip(group, tokenized(texts, self.tokenizer, front), strict=True):
                        yield document.ids, behind
                if is_whole and not num_documents:
                    raise UserError(f"Part {part + 1} of {self.num_parts} of the data set {self.name} has no text.")
                is_whole, place = True, None

    def _file(self, part: int, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06}-{part}.{suffix}"


def stream(source: Corpus, tokenizer: Any, limit: int) -> TokenData:
    """A streamed data set for a step of so many tokens. Documents of its beginning that are held out, by a hash of
    their text, lie in the cache; no chunk has them."""
    head, tokens = tokenize(source, tokenizer, limit=min(limit, HEAD)), Stream(source, tokenizer, min(limit, CHUNK))
    fingerprint = hashlib.sha256(f"{head.fingerprint} {tokens.fingerprint}".encode()).hexdigest()[:20]
    return TokenData(tokens, head.held_out, fingerprint, head.text_bytes)


def _taken(documents: Documents, count: int) -> tuple[list[int], list[int], Place]:
    """The next so many ids, where documents begin in them, and the place behind the last document, of which what does
    not fit is left out."""
    ids, starts, place = list[int](), list[int](), None
    while len(ids) < count:
        starts.append(len(ids))
        more, place = next(documents)
        ids += more
    return ids[:count], starts, place


def _groups(rows: Any, name: str) -> Iterator[list[tuple[str, Place]]]:
    """Texts to be tokenised at once, each with the place behind it."""
    group: list[tuple[str, Place]] = []
    for row in rows:
        if (text := text_of(row, name)) and not is_held_out(text):
            group.append((text, rows.state_dict()))
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group
