"""Which mixer can do what? The six tasks of Mechanistic Architecture Design (arXiv 2403.17844), each learnt from
scratch by a tiny model.

    python -m experiments.mad --mixers attention,linear,mamba,mamba2,gate-swa,mla   # reduced: minutes on two cores
    python -m experiments.mad --mixers mamba2 --paper     # the paper's sizes, rates and epochs: for a GPU

A score is the accuracy on unseen sequences, at the best of the learning rates, and with `--paper` the mean over the
difficulties; the mean over the tasks screens a mixer before a long run. The model is mad-lab's: two blocks of mixer and
SwiGLU, width 128. Training targets are the shifted inputs, the test counts only what can be known."""

import argparse
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from convert.cli import fail_in_words, whole_number
from convert.core.console import Console
from convert.core.errors import UserError
from convert.core.files import write_json
from convert.data.batches import Batch
from convert.mixers import MIXERS
from convert.models.devices import pick_device
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training.settings import Settings
from convert.training.supervised import supervised
from experiments.mad_tasks import IGNORED, TASKS, Difficulty, Task, compression


@dataclass(frozen=True)
class Effort:
    """How long each task is learnt, in batches of so many examples, and which rates and weight decays are tried."""

    batch: int
    lrs: tuple[float, ...]
    decays: tuple[float, ...]
    epochs: int

    def steps_of(self, d: Difficulty) -> int:
        return self.epochs * math.ceil(d.examples / self.batch)


REDUCED = Effort(32, (2e-3,), (0.0,), epochs=1)  # ours
PAPER = Effort(128, (1e-4, 5e-4, 1e-3), (0.0, 0.1), epochs=200)


# --- the model


class Model(nn.Module):
    """Two blocks; for compression a decoder that sees the last state and a position."""

    def __init__(self, mixer: str, vocab: int, decodes: int | None, length: int) -> None:
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

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """[B, T, D], from which the head tells T tokens. A sequence is one document: positions need not be given."""
        if isinstance(self.model, ConvertedForCausalLM):
            x = self.model.hidden_states(input_ids)
        else:
            x = self.model.model(input_ids, use_cache=False).last_hidden_state
        return x if self.places is None else x[:, -1:] + self.places.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head: logits of hidden states."""
        return self.model.get_output_embeddings() if self.decoder is None else self.decoder

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T, V]."""
        return self.get_output_embeddings()(self.hidden_states(ids))


@dataclass(frozen=True)
class Schedule(Settings):
    """The settings of a stage, with mad-lab's schedule: a cosine from the first step, down to 1e-6."""

    def rate(self, step: int) -> float:
        return 1e-6 + (self.lr - 1e-6) * (1 + math.cos(math.pi * step / self.num_steps)) / 2


def learn(model: Model, inputs: np.ndarray, targets: np.ndarray, effort: Effort, lr: float, decay: float) -> None:
    """Train on the examples [N, T], in a new order in each epoch. Every parameter has the weight decay."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a)).long() for a in (inputs, targets))
    per_epoch = math.ceil(len(x) / effort.batch)
    orders = [torch.randperm(len(x)) for _ in range(effort.epochs)]
    positions = torch.arange(x.shape[1])
    tokens = effort.batch * x.shape[1]

    def batch(step: int) -> Batch:
        rows = orders[step // per_epoch][step % per_epoch * effort.batch :][: effort.batch]
        return Batch(x[rows], y[rows], positions.expand(len(rows), -1))

    def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, betas=(0.9, 0.98))]

    settings = Schedule(
        tokens=effort.epochs * per_epoch * tokens, lr=lr, objective=Objective.of("cross_entropy"), trains="everything",
        seq_len=x.shape[1], batch_tokens=tokens, micro_tokens=tokens, precision="float32", loss_chunk=tokens,
    )  # fmt: skip
    supervised(model, None, batch, settings, optimizers=optimizers)


@torch.no_grad()
def accuracy(model: Model, inputs: np.ndarray, targets: np.ndarray, batch: int) -> float:
    """The share of known targets [N, T] that the model tells."""
    device = next(model.parameters()).device
    correct = total = 0
    for i in range(0, len(inputs), batch):
        found = model(torch.from_numpy(inputs[i : i + batch]).long().to(device)).argmax(-1).cpu().numpy()
        known = targets[i : i + batch] != IGNORED
        correct, total = correct + (found == targets[i : i + batch])[known].sum(), total + known.sum()
    return float(correct / total)


def score(
    mixer: str, task: Task, d: Difficulty, effort: Effort, lr: float, decay: float, seed: int, device: str
) -> float:
    """Accuracy on 1,280 unseen sequences after training."""
    inputs, targets = task.make(np.random.default_rng(seed), d.examples, d, False)
    unseen, known = task.make(np.random.default_rng(seed + 1), 1280, d, True)
    torch.manual_seed(seed)
    length = inputs.shape[1]
    model = Model(mixer, d.vocab, length if task.make is compression else None, length).to(device)
    learn(model, inputs, targets, effort, lr, decay)
    return accuracy(model, unseen, known, effort.batch)


def mean_score(
    mixer: str,
    task: str,
    difficulties: Sequence[Difficulty],
    effort: Effort,
    trials: Sequence[tuple[float, float]],
    seed: int,
    device: str,
) -> float:
    """The mean over the difficulties, at the best of the trials (a rate, a weight decay) of each."""
    best = [max(score(mixer, TASKS[task], d, effort, *trial, seed, device) for trial in trials) for d in difficulties]
    return sum(best) / len(best)


def _start_worker(threads: int | None) -> None:
    """Models this small are learnt side by side, a core each; the bars of their trainings would write over the one that
    counts tasks."""
    if threads is not None:
        torch.set_num_threads(threads)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


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
    effort, device = PAPER if args.paper else REDUCED, pick_device(args.device)
    found: dict[str, dict[str, float]] = {}
    trials = [(lr, decay) for lr in effort.lrs for decay in effort.decays]
    settings = {task: TASKS[task].settings() if args.paper else [TASKS[task].reduced] for task in tasks}
    difficulties = {task: [dataclasses.asdict(d) for d in some] for task, some in settings.items()}
    jobs = list(itertools.product(mixers, tasks))
    alone = device != "cpu"
    with ProcessPoolExecutor(
        1 if alone else os.cpu_count(),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(None if alone else 1,),
    ) as pool:
        waits = {
            pool.submit(mean_score, *job, settings[job[1]], effort, trials, args.seed, device): job for job in jobs
        }
        for done in tqdm(as_completed(waits), total=len(jobs), unit="task", dynamic_ncols=True):
            mixer, task = waits[done]
            found.setdefault(mixer, {})[task] = done.result()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            settings_used = dataclasses.asdict(effort)
            write_json(args.out, {"settings": settings_used, "difficulties": difficulties, "scores": found})
    table = Table("mixer", *tasks, "mean", title="accuracy on unseen sequences", title_justify="left")
    for mixer, row in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(mixer, *(f"{row[task]:.1%}" for task in tasks), f"{sum(row.values()) / len(row):.1%}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
