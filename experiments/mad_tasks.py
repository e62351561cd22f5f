"""The six tasks of Mechanistic Architecture Design (arXiv 2403.17844), as the code of athms/mad-lab makes them, and how
each is made harder.

Inputs and targets are [N, T]; in the test the targets are what can be known, in training often the next token.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class Difficulty:
    """`examples`: of training. `noise`: the share of pairs that mean nothing, from the last `noise_vocab` tokens.
    `copied`: tokens to copy. `longest`: tokens of a fuzzy key or value."""

    vocab: int = 16
    seq_len: int = 128
    examples: int = 12_800
    noise: float = 0.0
    noise_vocab: int = 0
    copied: int = 16
    longest: int = 3


def recall(rng: np.random.Generator, n: int, d: Difficulty, testing: bool):
    """Keys and values in turn; the value of a key that was there before is what counts."""
    half, pairs = (d.vocab - d.noise_vocab) // 2, d.seq_len // 2
    value_of = rng.integers(half, 2 * half, size=(n, half))
    keys, rows = rng.integers(0, half, size=(n, pairs)), np.arange(n)
    is_noise = rng.random((n, pairs)) < d.noise
    first = rng.integers(0, pairs - 1, size=n)
    is_noise[rows, first], is_noise[:, -1] = False, False
    keys[:, -1] = keys[rows, first]  # the last one is known
    inputs = np.stack([keys, np.take_along_axis(value_of, keys, 1)], -1)
    inputs[is_noise] = rng.integers(2 * half, d.vocab, size=(int(is_noise.sum()), 2)) if d.noise else 0
    seen = np.zeros((n, half), dtype=bool)
    counts = np.full((n, pairs, 2), IGNORED)
    for place in range(pairs):
        known = seen[rows, keys[:, place]] & ~is_noise[:, place]
        counts[known, place, 1] = inputs[known, place, 1]
        seen[rows, keys[:, place]] |= ~is_noise[:, place]
    inputs, counts = inputs.reshape(n, -1), counts.reshape(n, -1)
    return inputs[:, :-1], (counts if testing else inputs)[:, 1:]


def fuzzy_recall(rng: np.random.Generator, n: int, d: Difficulty, testing: bool):
    """Keys and values of one to three tokens; in the test the keys have three."""
    rows = [_fuzzy(rng, d, d.longest if testing else 1) for _ in range(n)]
    inputs, counts = np.stack([i for i, _ in rows]), np.stack([c for _, c in rows])
    return inputs[:, :-1], (counts if testing else inputs)[:, 1:]


def _fuzzy(rng: np.random.Generator, d: Difficulty, shortest_key: int):
    half, pad = (d.vocab - 1) // 2, d.vocab - 1

    def draw(low: int, high: int, short: int) -> tuple[int, ...]:
        return tuple(rng.permutation(np.arange(low, high))[: rng.integers(short, d.longest + 1)].tolist())

    value_of, inputs, counts = {}, [], []

    def put(key):
        known = key in value_of
        value = value_of.setdefault(key, draw(half, pad, 1))
        inputs.extend(key + value)
        counts.extend([IGNORED] * len(key) + (list(value) if known else [IGNORED] * len(value)))

    while len(inputs) < d.seq_len - 4 * d.longest:
        put(draw(0, half, shortest_key))
    put(list(value_of)[rng.integers(len(value_of))])
    missing = d.seq_len + 1 - len(inputs)
    return np.array([pad] * missing + inputs), np.array([IGNORED] * missing + counts)


def copying(rng: np.random.Generator, n: int, d: Difficulty, testing: bool):
    """Some tokens among blanks, in order, after a sign."""
    before = d.seq_len - d.copied - 1
    tokens = rng.integers(0, d.vocab - 2, size=(n, d.copied))
    inputs = np.full((n, d.seq_len), d.vocab - 2)
    for row in range(n):
        inputs[row, np.sort(rng.choice(before, d.copied, replace=False))] = tokens[row]
    inputs[:, -d.copied - 1] = d.vocab - 1
    counts = np.full((n, d.seq_len), IGNORED)
    counts[:, -d.copied :] = tokens
    return inputs, counts


def compression(rng: np.random.Generator, n: int, d: Difficulty, testing: bool):
    """All of a text from the state at its last token."""
    inputs = rng.integers(0, d.vocab - 1, size=(n, d.seq_len))
    inputs[:, -1] = d.vocab - 1
    return inputs, inputs


def memorisation(rng: np.random.Generator, n: int, d: Difficulty, testing: bool):
    """A fixed dictionary, that no text shows: the weights must hold it."""
    half = (d.vocab - 1) // 2
    value_of = np.random.default_rng(12345).permutation(np.arange(half, d.vocab - 1))[:half]
    keys = rng.integers(0, half, size=(n, d.seq_len // 2))
    inputs = np.stack([keys, np.full_like(keys, d.vocab - 1)], -1).reshape(n, -1)
    counts = np.stack([np.full_like(keys, IGNORED), value_of[keys]], -1).reshape(n, -1)
    return inputs, counts


@dataclass(frozen=True)
class Task:
    """`changes`: what makes it harder than `baseline`, one thing at a time. `reduced`: for a laptop (ours)."""

    make: Callable
    baseline: Difficulty
    changes: dict[str, tuple]
    reduced: Difficulty

    def settings(self) -> list[Difficulty]:
        """The baseline, and each change of it (the paper's score is the mean over these)."""
        harder = [
            dataclasses.replace(self.baseline, **{what: value})
            for what, values in self.changes.items()
            for value in values
        ]
        return [self.baseline, *harder]


RECALLS = 19_200  # examples that teach recall in 32 tokens to who can learn it (ours)
VOCABS, LENGTHS, EXAMPLES = (32, 64, 128), (256, 512, 1024), (6400, 3200, 1600, 800)
NOISY = Difficulty(vocab=32, noise=0.2, noise_vocab=16)
TASKS = {
    "in-context recall": Task(
        recall,
        Difficulty(),
        {"vocab": VOCABS, "seq_len": LENGTHS, "examples": EXAMPLES},
        Difficulty(8, 32, RECALLS),
    ),
    "noisy recall": Task(
        recall,
        NOISY,
        {"vocab": (48, 80, 144), "seq_len": LENGTHS, "examples": EXAMPLES, "noise": (0.4, 0.6, 0.8)},
        Difficulty(16, 32, RECALLS, noise=0.2, noise_vocab=8),
    ),
    "fuzzy recall": Task(
        fuzzy_recall,
        Difficulty(),
        {"vocab": VOCABS, "seq_len": LENGTHS, "examples": EXAMPLES},
        Difficulty(9, 32, RECALLS, longest=2),
    ),
    "selective copying": Task(
        copying,
        Difficulty(seq_len=256),
        {"vocab": VOCABS, "seq_len": (512, 1024), "examples": EXAMPLES, "copied": (32, 64, 96)},
        Difficulty(10, 48, copied=8),
    ),
    "compression": Task(
        compression,
        Difficulty(seq_len=32),
        {"vocab": VOCABS, "seq_len": (64, 128, 256), "examples": EXAMPLES},
        Difficulty(seq_len=16),
    ),
    "memorisation": Task(
        memorisation,
        Difficulty(vocab=256, seq_len=32, examples=256),
        {"vocab": (512, 1024, 2048, 4096, 8192)},
        Difficulty(vocab=256, seq_len=32, examples=6400),
    ),
}
