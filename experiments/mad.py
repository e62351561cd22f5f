"""Which mixer can do what? The six tasks of Mechanistic Architecture Design (arXiv 2403.17844), each learnt from
scratch by a tiny model.

    python -m experiments.mad --mixers attention,linear,mamba,mamba2,gate-swa,mla     # reduced: under ten minutes on
    two cores
    python -m experiments.mad --mixers mamba2 --paper        # the paper's sizes, rates and epochs, each task made
    harder step by step: for a GPU

A score is the accuracy on unseen sequences, at the best of the learning rates, and with `--paper` the mean over the
difficulties; the mean over the tasks screens a mixer before a long run. The model is mad-lab's: two blocks of mixer and
SwiGLU, width 128. Training targets are the shifted inputs, the test counts only what can be known."""

import argparse
import dataclasses
import itertools
import math
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from convert.cli import fail_in_words, whole_number
from convert.core.console import Console
from convert.core.errors import UserError
from convert.core.files import write_json
from convert.mixers import MIXERS
from convert.mixers.mamba_block import project_gradients
from convert.models.devices import pick_device
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from experiments.mad_tasks import IGNORED, TASKS, Difficulty, Task, compression


@dataclass(frozen=True)
class Settings:
    batch: int
    lrs: tuple[float, ...]
    decays: tuple[float, ...]
    epochs: int

    def steps_of(self, d: Difficulty) -> int:
        return self.epochs * math.ceil(d.examples / self.batch)


REDUCED = Settings(32, (2e-3,), (0.0,), epochs=1)  # ours
PAPER = Settings(128, (1e-4, 5e-4, 1e-3), (0.0, 0.1), epochs=200)


# --- the model


class Model(nn.Module):
    """Two blocks; for compression a decoder that sees the last state and a position."""

    def __init__(self, mixer: str, vocab: int, decodes: int | None, length: int):
        super().__init__()
        config = AutoConfig.for_model(
            "llama",
            vocab_size=vocab,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=256,
            max_position_embeddings=2 * length,
        )
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


def score(mixer: str, task: Task, d: Difficulty, s: Settings, lr: float, decay: float, seed: int, device: str) -> float:
    """Accuracy on 1,280 unseen sequences after training."""
    steps = s.steps_of(d)
    inputs, targets = task.make(np.random.default_rng(seed), d.examples, d, False)
    tested, counts = task.make(np.random.default_rng(seed + 1), 1280, d, True)
    torch.manual_seed(seed)
    length = inputs.shape[1]
    model = Model(mixer, d.vocab, length if task.make is compression else None, length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-6)
    x, y = (torch.from_numpy(np.ascontiguousarray(a)).long().to(device) for a in (inputs, targets))
    per_epoch = math.ceil(len(x) / s.batch)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x))
        rows = order[step % per_epoch * s.batch :][: s.batch]
        loss = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten(), ignore_index=IGNORED)
        loss.backward()
        project_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    right = total = 0
    with torch.no_grad():
        for i in range(0, len(tested), s.batch):
            found = model(torch.from_numpy(tested[i : i + s.batch]).long().to(device)).argmax(-1).cpu().numpy()
            known = counts[i : i + s.batch] != IGNORED
            right, total = right + (found == counts[i : i + s.batch])[known].sum(), total + known.sum()
    return float(right / total)


def mean_score(
    mixer: str, task: str, difficulties: list[Difficulty], s: Settings, trials, seed: int, device: str
) -> float:
    """Over the difficulties, at the best of the trials of each."""
    best = [max(score(mixer, TASKS[task], d, s, *trial, seed, device) for trial in trials) for d in difficulties]
    return sum(best) / len(best)


def _one_thread() -> None:
    """Models this small are learnt side by side, a core each."""
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", default=",".join(("attention", *MIXERS)))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--paper", action="store_true", help="the paper's sizes, rates and epochs")
    parser.add_argument("--seed", type=whole_number(0, 2**32 - 1), default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/mad.json"))
    args = parser.parse_args()
    mixers, tasks = args.mixers.split(","), args.tasks.split(",")
    for kind, names, known in (("mixer", mixers, ("attention", *MIXERS)), ("task", tasks, TASKS)):
        if wrong := [name for name in names if name not in known]:
            raise UserError(f"There is no {kind} {wrong[0]!r}; there are {', '.join(known)}.")
    s, device, found = PAPER if args.paper else REDUCED, pick_device(args.device), {}
    trials = [(lr, decay) for lr in s.lrs for decay in s.decays]
    settings = {task: TASKS[task].settings() if args.paper else [TASKS[task].reduced] for task in tasks}
    difficulties = {task: [dataclasses.asdict(d) for d in some] for task, some in settings.items()}
    jobs = list(itertools.product(mixers, tasks))
    alone = device != "cpu"
    with ProcessPoolExecutor(
        1 if alone else os.cpu_count(), mp_context=get_context("spawn"), initializer=None if alone else _one_thread
    ) as pool:
        waits = {pool.submit(mean_score, *job, settings[job[1]], s, trials, args.seed, device): job for job in jobs}
        for done in tqdm(as_completed(waits), total=len(jobs), unit="task", dynamic_ncols=True):
            mixer, task = waits[done]
            found.setdefault(mixer, {})[task] = done.result()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, {"settings": dataclasses.asdict(s), "difficulties": difficulties, "scores": found})
    table = Table("mixer", *tasks, "mean", title="accuracy on unseen sequences", title_justify="left")
    for mixer, row in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(mixer, *(f"{row[task]:.1%}" for task in tasks), f"{sum(row.values()) / len(row):.1%}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
