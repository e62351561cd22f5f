"""Conversations -> batches: whole conversations packed into sequences.

B sequences · T tokens of a sequence
"""

import functools
from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np
import torch

from convert.core.errors import UserError
from convert.data.batches import Batch
from convert.data.text import Tokens


class PackedBatches:
    """`batches(step)`: the batch of one step, whose sequences hold whole conversations apart from each other.

    Conversations are packed once, longest first, each into the fullest sequence that has room (best-fit decreasing, as
    "Fewer Truncations Improve Language Modeling", arXiv 2404.10830); the order of the sequences is drawn anew for each
    epoch. One that is longer than `seq_len` is cut at its end, and left out where that leaves nothing to learn; a
    message counts both. `masking`: which tokens are targets, those that an assistant wrote ("completions") or "all".
    Rows are padded to the longest of their batch."""

    def __init__(self, tokens: Tokens, seq_len: int, num_sequences: int, seed: int = 0, masking: str = "completions"):
        self.tokens, self.num_sequences, self.seed, self.masking = tokens, num_sequences, seed, masking
        ends = np.append(tokens.starts[1:], len(tokens))
        # the last token of a document is a target alone, so a document takes a place less than it has tokens
        self.sizes = np.minimum(ends - tokens.starts - 1, seq_len)
        learnt = np.concatenate([[0], np.cumsum(self._is_target(0, len(tokens)))])
        has_targets = learnt[tokens.starts + self.sizes + 1] > learnt[tokens.starts + 1]
        usable = np.flatnonzero(has_targets)
        if not len(usable):
            raise UserError(
                f"No conversation has anything to learn within --seq-len {seq_len:,}; their prompts are longer. Give a"
                " larger one, or shorter conversations."
            )
        if cut := int((ends - tokens.starts - 1 > seq_len).sum()):
            _tell(
                f"{cut:,} of {len(ends):,} conversations are longer than {seq_len:,} tokens and are cut at their end;"
                f" {len(ends) - len(usable):,} have nothing left to learn and are left out."
            )
        order = np.random.default_rng(seed).permutation(usable)
        order = order[np.argsort(-self.sizes[order], kind="stable")]
        self.rows = [[int(order[i]) for i in row] for row in best_fit(self.sizes[order].tolist(), seq_len)]

    def __call__(self, step: int) -> Batch:
        documents = []
        for i in range(step * self.num_sequences, (step + 1) * self.num_sequences):
            order = _epoch_order(len(self.rows), self.seed, i // len(self.rows))
            documents.append(self.rows[order[i % len(self.rows)]])
        lengths = [int(self.sizes[row].sum()) for row in documents]
        shape = len(documents), max(lengths)
        ids, labels, positions = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
        for row, found in enumerate(documents):
            at = 0
            for document in found:
                start, size = int(self.tokens.starts[document]), int(self.sizes[document])
                here, targets = slice(at, at + size), slice(start + 1, start + size + 1)
                ids[row, here] = self.tokens.ids[start : start + size]
                wanted = self._is_target(targets.start, targets.stop)
                labels[row, here][wanted] = self.tokens.ids[targets][wanted]  # others stay -100, which no id can be
                positions[row, here] = np.arange(size)
                at += size
            positions[row, at:] = np.arange(shape[1] - at)  # padding is a document of its own, behind all others
        padded_from = torch.tensor(lengths) if len(set(lengths)) > 1 else None
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), padded_from)

    def _is_target(self, start: int, end: int) -> np.ndarray:
        if self.masking == "all" or self.tokens.completions is None:
            return np.ones(end - start, bool)
        return self.tokens.completions[start:end]


def best_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Places of the sizes (largest first) in bins of `room`: each goes into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> bins
    rooms: list[int] = []  # those in use, sorted
    for place, size in enumerate(sizes):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del rooms[at]
        bins[chosen].append(place)
        left -= size
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return bins


@functools.lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng((seed, epoch)).permutation(num_rows).tolist()


@functools.cache
def _tell(message: str) -> None:
    """Print a message once, however often the batches are made."""
    print(message)
