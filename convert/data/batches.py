"""Tokens -> batches. A batch is a function of (seed, step), so a resumed run sees the same data.

B sequences · T tokens of a sequence
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.core.fields import Range, check, checked
from convert.data.stream import Stream
from convert.data.text import Tokens


@dataclass(frozen=True)
class Batch:
    """Packed documents. All [B, T]; `labels` are the next tokens, -100 where the next token is of another document or
    is not to be learnt. `lengths` [B]: tokens of each row, behind which it is padded (None: no row is); they stay on
    the CPU, where Python asks for them. `places` [N]: see `target_places`, which finds them where they are None.
    `recorded`: what a teacher said of each token, [B, T, ...]; none where the teacher is asked."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor  # from 0 in each document: that is how models tell documents apart
    lengths: Tensor | None = None
    places: Tensor | None = None
    recorded: tuple[Tensor, ...] = ()

    def pin_memory(self) -> "Batch":
        """The batch in memory from which a GPU copies by itself."""
        ids, labels, positions = (t.pin_memory() for t in (self.input_ids, self.labels, self.position_ids))
        return Batch(ids, labels, positions, self.lengths, recorded=tuple(t.pin_memory() for t in self.recorded))

    def to(self, device: Any) -> "Batch":
        """The batch on a device, which is not waited for where this one is pinned. Places are found before the labels
        go: to ask a GPU for them would wait until it has done all that it was told."""
        places, is_pinned = self.target_places, self.labels.is_pinned()
        tensors = self.input_ids, self.labels, self.position_ids, places.pin_memory() if is_pinned else places
        ids, labels, positions, places = (t.to(device, non_blocking=is_pinned) for t in tensors)
        recorded = tuple(t.to(device, non_blocking=is_pinned) for t in self.recorded)
        return Batch(ids, labels, positions, self.lengths, places, recorded)

    def split(self, num_sequences: int) -> list["Batch"]:
        """Micro-batches of at most so many sequences."""
        parts = [t.split(num_sequences) for t in (self.input_ids, self.labels, self.position_ids)]
        lengths = [None] * len(parts[0]) if self.lengths is None else self.lengths.split(num_sequences)
        pieces = [each.split(num_sequences) for each in self.recorded]
        recorded = [tuple(piece[i] for piece in pieces) for i in range(len(parts[0]))]
        rows = zip(*parts, lengths, recorded, strict=True)
        return [Batch(ids, labels, positions, n, recorded=said) for ids, labels, positions, n, said in rows]

    def parts(self, num_tokens: int, at_least: int = 1) -> list["Batch"]:
        """Micro-batches of at most so many tokens, or of one sequence; `at_least` that many, as far as equal numbers of
        sequences give them."""
        num_rows, length = self.input_ids.shape
        return self.split(min(max(1, num_tokens // length), -(-num_rows // at_least)))

    def with_noise(self, share: float, seed: tuple[int, int]) -> "Batch":
        """That share of the input tokens, drawn from `seed`, replaced by tokens from elsewhere in the batch. Labels
        and padding stay."""
        if not share:
            return self
        rng, elsewhere = np.random.default_rng(seed), self.input_ids.clone()
        real = self.input_ids[self.padding_mask]
        elsewhere[self.padding_mask] = real[torch.from_numpy(rng.permutation(real.numel()))]
        is_replaced = torch.from_numpy(rng.random(self.input_ids.shape) < share)
        return replace(self, input_ids=torch.where(is_replaced, elsewhere, self.input_ids))

    @property
    def padding_mask(self) -> Tensor:
        """[B, T], False at padding."""
        if self.lengths is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        device = self.input_ids.device
        return torch.arange(self.input_ids.shape[1], device=device) < self.lengths.to(device)[:, None]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.input_ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def num_units(self) -> int:
        """What training counts."""
        return self.num_tokens

    def unpadded(self) -> list[tuple[slice, int]]:
        """Rows and how many of their tokens are none of padding: all rows at once, or one by one where some are
        padded."""
        if self.lengths is None:
            return [(slice(None), self.input_ids.shape[1])]
        return [(slice(i, i + 1), length) for i, length in enumerate(self.lengths.tolist())]

    @property
    def target_places(self) -> Tensor:
        """[N]: which of the flattened labels are targets."""
        return (self.labels.flatten() != -100).nonzero()[:, 0] if self.places is None else self.places

    @property
    def num_targets(self) -> int:
        return len(self.target_places)


@dataclass(frozen=True)
class Batches:
    """`batches(step)`: the batch of one step. Windows of `seq_len` tokens in an order drawn anew for each epoch, which
    of a stream has tokens of its own."""

    tokens: Tokens | Stream
    seq_len: Annotated[int, Range(1, 2**24)]
    num_sequences: Annotated[int, Range(1, 2**27)]
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        check(self)
        if len(self.tokens) < 2 * self.seq_len + 1:
            raise UserError(
                f"Training needs at least two sequences of {self.seq_len} tokens; the data has {len(self.tokens)}"
                " tokens. Give more data or a smaller --seq-len."
            )

    @checked
    def __call__(self, step: Annotated[int, Range(0, 2**53)]) -> Batch:
        found = []
        of_step = range(step * self.num_sequences, (step + 1) * self.num_sequences)
        for epoch, places in groupby(of_step, lambda i: i // self.per_epoch):
            offset, order = _epoch_order(self.per_epoch, self.seq_len, self.seed, epoch)
            rows = [offset + self.seq_len * int(order[i % self.per_epoch]) for i in places]
            found.append(_windows(self.tokens.of_epoch(epoch), rows, self.seq_len))
        if len(found) == 1:
            return found[0]
        return Batch(*map(torch.cat, zip(*((b.input_ids, b.labels, b.position_ids) for b in found), strict=True)))

    @property
    def per_epoch(self) -> int:
        """The windows of an epoch."""
        return len(self.tokens) // self.seq_len - 1


@dataclass(frozen=True)
class StreamBatches(Batches):
    """Batches of a stream for so many steps. When half of a chunk is read, the next one that they need is begun."""

    tokens: Stream
    num_steps: Annotated[int, Range(1, 2**53)] = 2**53

    def __call__(self, step: int) -> Batch:
        batch = super().__call__(step)
        epoch, place = divmod((step + 1) * self.num_sequences, self.per_epoch)
        if place > self.per_epoch // 2 and (epoch + 1) * self.per_epoch < self.num_steps * self.num_sequences:
            self.tokens.begin(epoch + 1)
        return batch

    def position(self, step: int) -> dict[str, Any]:
        """The place of a step's data in their files, which its checkpoint keeps."""
        return self.tokens.position(step * self.num_sequences // self.per_epoch)

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on from the position of a step. Raises UserError where it is one of other data."""
        self.tokens.go_to(position)


@lru_cache(maxsize=4)
def _epoch_order(num_windows: int, seq_len: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(seq_len)), rng.permutation(num_windows)


def held_out_batches(tokens: Tokens, seq_len: int, num_sequences: int, max_tokens: int) -> list[Batch]:
    """The same windows every time, spread evenly over the held-out text, in batches of `num_sequences`."""
    available = (len(tokens) - 1) // seq_len
    if not available:
        raise UserError(
            f"Held-out text has {len(tokens)} tokens, fewer than one sequence of {seq_len}. Give more data or a smaller"
            " --seq-len."
        )
    count = max(1, min(available, max_tokens // seq_len))
    rows = [seq_len * (i * available // count) for i in range(count)]
    return [_windows(tokens, rows[i : i + num_sequences], seq_len) for i in range(0, count, num_sequences)]


def _windows(tokens: Tokens, rows: list[int], seq_len: int) -> Batch:
    ids = np.stack([np.asarray(tokens.ids[r : r + seq_len + 1], dtype=np.int64) for r in rows])
    where = np.array(rows)[:, None] + np.arange(seq_len + 1)
    documents = np.searchsorted(tokens.starts, where, side="right") - 1
    begins = np.maximum(tokens.starts[documents], np.array(rows)[:, None])  # a window's first document starts with it
    labels = np.where(documents[:, 1:] == documents[:, :-1], ids[:, 1:], -100)
    arrays = ids[:, :-1], labels, (where - begins)[:, :-1]
    return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
