"""Text that is read while it is trained on, for a corpus that does not fit on a disk: its tokens in chunks.

CACHE/streams/KEY/000012-3.npz    chunk 12 of part 3: token ids, and where documents begin
CACHE/streams/KEY/000012-3.json   where part 3 stands in its files before that chunk

The files of a data set are dealt to a few parts, and a chunk has equally many tokens of each. What is in it depends on
the data and its number alone, so a batch is a function of (seed, step) however many processes there are, and whichever
of them made it. Chunks that were read are removed, but for the last three.
"""

import fcntl
import hashlib
import json
import math
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.core.errors import UserError
from convert.core.files import parse_json, sealed, unsealed, write_json
from convert.core.places import cache_folder
from convert.core.processes import rank, world
from convert.data.corpus import Corpus, is_held_out, text_of
from convert.data.hub import hub_data
from convert.data.prompts import leading
from convert.data.text import GROUP, TokenData, Tokens, id_type, tokenize, tokenized, tokenizer_fingerprint

CHUNK = 1 << 22  # tokens at most (ours)
MOST_PARTS = 8  # processes that read at once (ours)
HEAD = 1 << 22  # tokens at the beginning of the data, among which held-out documents are looked for, at most (ours)
OFFLINE = "Without network give data on this machine: --data stdlib, or --data FOLDER."

Place = dict[str, Any] | None  # where a part stands in its files, as `datasets` says it; None: at the beginning
Documents = Iterator[tuple[list[int], Place]]  # the ids of each, and the place behind it


class Stream:
    """The tokens of a streamed data set, in chunks of about so many `tokens`."""

    completions: None = None  # a stream is of text

    def __init__(self, source: Corpus, tokenizer: Any, tokens: int) -> None:
        assert source.hub is not None
        self.name, self.config = source.hub
        self.tokenizer = tokenizer
        with hub_data(self.name, self.config, OFFLINE, split="train") as rows:
            self.num_parts = math.gcd(rows.num_shards, MOST_PARTS)  # of equally many files: none is read twice
        self.of_part = tokens // self.num_parts
        about = [source.hub, tokenizer_fingerprint(tokenizer), self.num_parts, self.of_part, 1]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
        self.folder = cache_folder() / "streams" / self.fingerprint
        self._thread = ThreadPoolExecutor(1, "stream")  # alone reads and writes, so that nothing here meets itself
        self._coming: dict[int, Future[Tokens]] = {}
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
        """Begin to read or make a chunk, unless that was begun."""
        if chunk not in self._coming:
            self._coming[chunk] = self._thread.submit(self._chunk, chunk)
        return self._coming[chunk]

    def position(self, chunk: int) -> dict[str, Any]:
        """The place of every part before a chunk, which a checkpoint keeps for a machine whose cache lacks it."""
        places = self._thread.submit(lambda: [self._place(part, chunk) for part in range(self.num_parts)]).result()
        return {"of": self.fingerprint, "chunk": chunk, "places": places}

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Go on from a position. Raises UserError where it is one of other data."""
        if position["of"] != self.fingerprint:
            raise UserError(
                "A run goes on with the data that it began with; the streamed data set has other files now, or another"
                " tokenizer. Start again with --fresh."
            )
        if position["chunk"]:
            for part, place in enumerate(position["places"]):
                self._note(part, position["chunk"], place)

    # --- a chunk; what follows runs in the thread

    def _chunk(self, number: int) -> Tokens:
        """The chunk as it is in the cache, where what is missing is made. Each process begins with other parts."""
        first = rank() * self.num_parts // world()
        parts = [i % self.num_parts for i in range(first, first + self.num_parts)]
        bar = tqdm(parts, desc="tokenise", unit="part", delay=3, disable=number > 0 or rank() > 0)
        read = {part: self._part(part, number) for part in bar}
        self._forget(self._last - 2)
        self._last = number
        starts = [read[part][1] + part * self.of_part for part in range(self.num_parts)]
        return Tokens(np.concatenate([read[part][0] for part in range(self.num_parts)]), np.concatenate(starts))

    def _part(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and where documents begin, of a part of a chunk. Another process may be making it: it is waited for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{part}.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process
            return self._read(part, number) or self._made(part, number)

    def _read(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What is in the cache, None where that is nothing, or is damaged."""
        try:
            with self._file(part, number, "npz").open("rb") as opened, np.load(opened) as found:  # it has checksums
                ids, starts = found["ids"], found["starts"]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
            return None
        return (ids, starts) if len(ids) == self.of_part else None

    def _made(self, part: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Make a part of a chunk. Of the document that crosses its end the rest is left out."""
        documents, ids, starts, place = self._from(part, number), list[int](), list[int](), None
        while len(ids) < self.of_part:
            starts.append(len(ids))
            more, place = next(documents)
            ids += more
        self._open[part] = number + 1, documents
        made: tuple[np.ndarray, np.ndarray] = np.array(ids[: self.of_part], id_type(self.tokenizer)), np.array(starts)
        file = self._file(part, number, "npz")
        aside = file.with_name(f"{file.name}.writing-{os.getpid()}")
        try:
            with aside.open("wb") as opened:
                np.savez(opened, ids=made[0], starts=made[1])
            aside.replace(file)
            self._note(part, number + 1, place)
        except OSError as error:
            raise UserError(
                f"Chunks of a stream must be cached, and {self.folder} cannot take them ({error}). Free some space, or"
                " set CONVERT_CACHE."
            ) from error
        finally:
            aside.unlink(missing_ok=True)
        return made

    def _from(self, part: int, number: int) -> Documents:
        """The documents of a part from a chunk on."""
        chunk, documents = self._open.pop(part, (-1, iter(())))
        return documents if chunk == number else self._documents(part, self._place(part, number))

    def _place(self, part: int, number: int) -> Place:
        """The place of a part before a chunk. If nothing tells it, the chunks before are made."""
        if not number:
            return None
        file = self._file(part, number, "json")
        try:
            return unsealed(parse_json(file.read_bytes(), str(file)))["place"]
        except (OSError, ValueError, LookupError, UserError):
            self._made(part, number - 1)
            return self._place(part, number)

    def _note(self, part: int, number: int, place: Place) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(part, number, "json"), sealed({"place": place}))

    def _documents(self, part: int, place: Place) -> Documents:
        """The documents of a part without those that are held out, again and again."""
        front, is_whole = leading(self.tokenizer), place is None
        with hub_data(self.name, self.config, OFFLINE, split="train") as data:
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

    def _forget(self, number: int) -> None:
        """Remove a chunk that was read."""
        for part in range(self.num_parts):
            for suffix in ("npz", "json"):
                self._file(part, number, suffix).unlink(missing_ok=True)


def stream(source: Corpus, tokenizer: Any, limit: int) -> TokenData:
    """A streamed data set for a step of so many tokens. Documents of its beginning that are held out, by a hash of
    their text, lie in the cache; no chunk has them."""
    head, tokens = tokenize(source, tokenizer, limit=min(limit, HEAD)), Stream(source, tokenizer, min(limit, CHUNK))
    fingerprint = hashlib.sha256(f"{head.fingerprint} {tokens.fingerprint}".encode()).hexdigest()[:20]
    return TokenData(tokens, head.held_out, fingerprint, head.text_bytes)


def _groups(rows: Any, name: str) -> Iterator[list[tuple[str, Place]]]:
    """Texts to be tokenised at once, each with the place behind it."""
    group: list[tuple[str, Place]] = []
    for row in rows:
        if (text := text_of(row, name)) and not is_held_out(text):
            group.append((text, rows.state_dict()))
        if len(group) == GROUP:
            yield group
            group = []
            if not threading.main_thread().is_alive():
                raise InterruptedError("the process ends while a chunk is made")
    if group:
        yield group
