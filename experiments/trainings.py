"""Many small trainings on all cores. Each result is kept in a file as it ends, so that what is stopped goes on."""

import contextlib
import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from convert.core import json_lines

T = TypeVar("T")
CORES = os.cpu_count() or 1


def train_all(
    train: Callable[[T], dict[str, Any]],
    wanted: Sequence[T],
    file: Path,
    in_words: Callable[[dict[str, Any]], str],
    jobs: int = CORES,
) -> None:
    """Append `train(each)` for each that is wanted to `file` (JSON, one a line), `jobs` at once, each with one thread.
    `train` is a function of a module, or a partial one. Ctrl-C ends all of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    json_lines.mend(file)
    if not wanted:
        return
    with (
        multiprocessing.get_context("spawn").Pool(min(jobs, len(wanted)), _start_worker) as pool,  # whose end ends it
        tqdm(total=len(wanted), unit="training", dynamic_ncols=True) as bar,
    ):
        for row in pool.imap_unordered(_Quiet(train), wanted):
            json_lines.append(file, [row])
            bar.update()
            bar.set_postfix_str(in_words(row))
        pool.close()  # its processes end by themselves, and leave nothing behind
        pool.join()


def mean_and_spread(percentages: Sequence[float]) -> str:
    """The mean over seeds, and the largest minus the smallest where there are several."""
    spread = f" ± {np.ptp(percentages):.1f}" if len(percentages) > 1 else ""
    return f"{np.mean(percentages):.1f}{spread}"


def keep_weights(model: nn.Module, file: Path) -> None:
    """Write a model's weights whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".writing")
    save_file(model.state_dict(), aside)
    aside.replace(file)


class _Quiet:
    """Trains without bars: those of several trainings would write over each other."""

    def __init__(self, train: Callable[[Any], dict[str, Any]]) -> None:
        self.train = train

    def __call__(self, each: Any) -> dict[str, Any]:
        with contextlib.redirect_stderr(io.StringIO()):
            return self.train(each)


def _start_worker() -> None:
    """What a process does first: small models gain nothing from a second thread, and Ctrl-C is for the process that
    started it, which ends this one."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
