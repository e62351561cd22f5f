"""Which mixer can do what? The six tasks of Mechanistic Architecture Design (arXiv 2403.17844), each learnt from scratch by a tiny model.

    python -m experiments.mad --mixers attention,linear,mamba,mamba2,gate-swa,mla     # reduced: ten minutes on two cores
    python -m experiments.mad --mixers mamba2 --paper                                 # the paper's sizes, rates and epochs, for a GPU

A score is the accuracy on unseen sequences, at the better of the learning rates; the mean over the tasks screens a mixer before a long run.
Tasks and model follow the code of athms/mad-lab: two blocks of mixer and SwiGLU, width 128; training targets are the shifted inputs, the test
counts only what can be known.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from convert.errors import UserError
from convert.mixers import MIXERS
from convert.model import ConvertedForCausalLM, swap
from convert.run import fail_in_words
from convert.teachers import pick_device

IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """`examples`: of training; 0: as many as are seen, all of them new (ours)."""

    seq_len: int
    copied: int
    examples: int
    steps: int
    batch: int
    lrs: tuple[float, ...]
    decays: tuple[float, ...]


REDUCED = Settings(64, 8, 0, 400, 32, (2e-3,), (0.0,))  # ours
PAPER = Settings(128, 16, 12_800, 20_000, 128, (1e-4, 5e-4, 1e-3), (0.0, 0.1))  # 200 epochs


# --- the tasks: inputs and targets [N, T]; in the test the targets are what can be known, in training often the next token


def recall(rng: np.random.Generator, n: int, s: Settings, testing: bool, vocab: int = 16, noise_vocab: int = 0, noise: float = 0.0):
    """Keys and values in turn; the value of a key that was there before is what counts. `noise`: the share of pairs that mean nothing."""
    half, pairs = (vocab - noise_vocab) // 2, s.seq_len // 2
    value_of = rng.integers(half, 2 * half, size=(n, half))
    keys, rows = rng.integers(0, half, size=(n, pairs)), np.arange(n)
    is_noise = rng.random((n, pairs)) < noise
    first = rng.integers(0, pairs - 1, size=n)
    is_noise[rows, first], is_noise[:, -1] = False, False
    keys[:, -1] = keys[rows, first]  # the last one is known
    inputs = np.stack([keys, np.take_along_axis(value_of, keys, 1)], -1)
    inputs[is_noise] = rng.integers(2 * half, vocab, size=(int(is_noise.sum()), 2)) if noise else 0
    seen = np.zeros((n, half), dtype=bool)
    counts = np.full((n, pairs, 2), IGNORED)
    for place in range(pairs):
        known = seen[rows, keys[:, place]] & ~is_noise[:, place]
        counts[known, place, 1] = inputs[known, place, 1]
        seen[rows, keys[:, place]] |= ~is_noise[:, place]
    inputs, counts = inputs.reshape(n, -1), counts.reshape(n, -1)
    return inputs[:, :-1], (counts if testing else inputs)[:, 1:]


def noisy_recall(rng: np.random.Generator, n: int, s: Settings, testing: bool):
    return recall(rng, n, s, testing, vocab=32, noise_vocab=16, noise=0.2)


def fuzzy_recall(rng: np.random.Generator, n: int, s: Settings, testing: bool, vocab: int = 16, longest: int = 3):
    """Keys and values of one to three tokens; in the test the keys have three."""
    half, pad = (vocab - 1) // 2, vocab - 1
    rows = [_fuzzy(rng, s.seq_len, half, vocab - 1, pad, longest, longest if testing else 1) for _ in range(n)]
    inputs, counts = np.stack([i for i, _ in rows]), np.stack([c for _, c in rows])
    return inputs[:, :-1], (counts if testing else inputs)[:, 1:]


def _fuzzy(rng: np.random.Generator, length: int, half: int, end: int, pad: int, longest: int, shortest_key: int):
    draw = lambda low, high, short: tuple(rng.permutation(np.arange(low, high))[: rng.integers(short, longest + 1)].tolist())  # noqa: E731
    value_of, inputs, counts = {}, [], []

    def put(key):
        known = key in value_of
        value = value_of.setdefault(key, draw(half, end, 1))
        inputs.extend(key + value)
        counts.extend([IGNORED] * len(key) + (list(value) if known else [IGNORED] * len(value)))

    while len(inputs) < length - 4 * longest:
        put(draw(0, half, shortest_key))
    put(list(value_of)[rng.integers(len(value_of))])
    missing = length + 1 - len(inputs)
    return np.array([pad] * missing + inputs), np.array([IGNORED] * missing + counts)


def copying(rng: np.random.Generator, n: int, s: Settings, testing: bool, vocab: int = 16):
    """Some tokens among blanks, in order, after a sign."""
    blanks, length = s.seq_len * 2 - 2 * s.copied - 1, s.seq_len * 2
    tokens = rng.integers(0, vocab - 2, size=(n, s.copied))
    inputs = np.full((n, length), vocab - 2)
    for row in range(n):
        inputs[row, np.sort(rng.choice(s.copied + blanks, s.copied, replace=False))] = tokens[row]
    inputs[:, -s.copied - 1] = vocab - 1
    counts = np.full((n, length), IGNORED)
    counts[:, -s.copied :] = tokens
    return inputs, counts


def memorisation(rng: np.random.Generator, n: int, s: Settings, testing: bool, vocab: int = 256):
    """A fixed dictionary, that no text shows: the weights must hold it."""
    half = (vocab - 1) // 2
    value_of = np.random.default_rng(12345).permutation(np.arange(half, vocab - 1))[:half]
    keys = rng.integers(0, half, size=(n, 16))
    inputs = np.stack([keys, np.full_like(keys, vocab - 1)], -1).reshape(n, -1)
    counts = np.stack([np.full_like(keys, IGNORED), value_of[keys]], -1).reshape(n, -1)
    return inputs, counts


def compression(rng: np.random.Generator, n: int, s: Settings, testing: bool, vocab: int = 16):
    """All of a text from the state at its last token."""
    inputs = rng.integers(0, vocab - 1, size=(n, 32))
    inputs[:, -1] = vocab - 1
    return inputs, inputs


TASKS = {
    "in-context recall": (recall, 16), "noisy recall": (noisy_recall, 32), "fuzzy recall": (fuzzy_recall, 16), "selective copying": (copying, 16),
    "compression": (compression, 16), "memorisation": (memorisation, 256),
}  # fmt: skip


# --- the model


class Model(nn.Module):
    """Two blocks; for compression a decoder that sees the last state and a position."""

    def __init__(self, mixer: str, vocab: int, decodes: int | None, length: int):
        super().__init__()
        config = AutoConfig.for_model(
            "llama", vocab_size=vocab, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, intermediate_size=256,
            max_position_embeddings=2 * length,
        )  # fmt: skip
        host = AutoModelForCausalLM.from_config(config)
        options = MIXERS[mixer].Options() if mixer != "attention" else None
        if mixer == "gate-swa":
            options = MIXERS[mixer].Options(window=length // 4)
        if mixer == "mla":
            options = MIXERS[mixer].Options(cache_budget=0.5, start="random")
        self.model = host if mixer == "attention" else swap(host, mixer, options)
        self.model.requires_grad_(True).train()
        self.places = nn.Embedding(decodes, 128) if decodes else None
        self.decoder = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, vocab)) if decodes else None

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T, V]."""
        if self.places is None:
            return self.model(ids, use_cache=False).logits
        student = isinstance(self.model, ConvertedForCausalLM)
        hidden = self.model.hidden_states(ids) if student else self.model.model(ids, use_cache=False).last_hidden_state
        return self.decoder(hidden[:, -1:] + self.places.weight)


def score(mixer: str, task: str, s: Settings, lr: float, decay: float, seed: int, device: str, bar: tqdm) -> float:
    """Accuracy on 1,280 unseen sequences after training."""
    make, vocab = TASKS[task]
    inputs, targets = make(np.random.default_rng(seed), s.examples or s.steps * s.batch, s, False)
    tested, counts = make(np.random.default_rng(seed + 1), 1280, s, True)
    torch.manual_seed(seed)
    model = Model(mixer, vocab, inputs.shape[1] if make is compression else None, inputs.shape[1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps, 1e-6)
    x, y = (torch.from_numpy(np.ascontiguousarray(a)).long().to(device) for a in (inputs, targets))
    order = torch.arange(len(x))
    for step in range(s.steps):
        at = step * s.batch % len(x)
        if at == 0:
            order = torch.randperm(len(x))
        rows = order[at : at + s.batch]
        loss = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
    model.eval()
    right = total = 0
    with torch.no_grad():
        for i in range(0, len(tested), s.batch):
            found = model(torch.from_numpy(tested[i : i + s.batch]).long().to(device)).argmax(-1).cpu().numpy()
            known = counts[i : i + s.batch] != IGNORED
            right, total = right + (found == counts[i : i + s.batch])[known].sum(), total + known.sum()
    return float(right / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(("attention", *MIXERS)))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--paper", action="store_true", help="the paper's sizes, rates and epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/mad.json"))
    args = parser.parse_args()
    mixers, tasks = args.mixers.split(","), args.tasks.split(",")
    for kind, names, known in (("mixer", mixers, ("attention", *MIXERS)), ("task", tasks, TASKS)):
        if wrong := [name for name in names if name not in known]:
            raise UserError(f"There is no {kind} {wrong[0]!r}; there are {', '.join(known)}.")
    s, device, found = PAPER if args.paper else REDUCED, pick_device(args.device), {}
    trials = [(lr, decay) for lr in s.lrs for decay in s.decays]
    with tqdm(total=len(mixers) * len(tasks) * len(trials) * s.steps, unit="step", dynamic_ncols=True) as bar:
        for mixer in mixers:
            for task in tasks:
                bar.set_description(f"{mixer}, {task}")
                found.setdefault(mixer, {})[task] = max(score(mixer, task, s, lr, decay, args.seed, device, bar) for lr, decay in trials)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({"settings": dataclasses.asdict(s), "scores": found}, indent=1))
    table = Table("mixer", *tasks, "mean", title="accuracy on unseen sequences", title_justify="left")
    for mixer, row in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(mixer, *(f"{value:.1%}" for value in row.values()), f"{sum(row.values()) / len(row):.1%}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
