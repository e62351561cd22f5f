"""How much memory does each process need where 1, 2 and 4 of them share a teacher and its student out? Two steps of
distill, float32, everything trained, of a llama with random weights.

python -m experiments.shared_memory                     # 400 M parameters: 20 GB of memory, 2 GB of disk, on a CPU
python -m experiments.shared_memory --parameters 100M
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from convert.cli import fail_in_words, number_of_tokens
from convert.core.console import console
from convert.core.processes import gathered, joined, rank, world
from convert.data.batches import Batches
from convert.mixers import MIXERS
from convert.models.access import layers_of
from convert.models.loading import load_teacher
from convert.models.sharding import copied
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training.distill import distill
from convert.training.parallel import in_parts
from convert.training.settings import Settings
from experiments.memory import random_text
from kernels.machine import PeakMemory, trim_heap

VOCABULARY, WIDTH, INNER = 4096, 1024, 4096  # neox-nano's vocabulary
PER_LAYER = 4 * WIDTH**2 + 3 * WIDTH * INNER
SEQ_LEN, ROWS = 32, 4  # of a batch; a micro-batch is a row
MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    trim_heap()
    with PeakMemory() as now:
        pass
    return now.bytes + int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(folder: Path, mixer: str) -> dict[str, float]:
    """What this process holds after each part of the work, and at the peak of the training, above what it had at first;
    in bytes."""
    torch.ones(2) @ torch.ones(2)
    at_first = resident()
    teacher = load_teacher(folder, shared=world() > 1).model
    found = {"teacher": resident() - at_first}
    student = swap(copied(teacher), mixer)
    found["student"] = resident() - at_first - found["teacher"]
    settings = Settings(
        tokens=2 * ROWS * SEQ_LEN, lr=1e-4, objective=Objective.of("forward_kl"), trains="everything", seq_len=SEQ_LEN,
        batch_tokens=ROWS * SEQ_LEN, micro_tokens=SEQ_LEN, precision="float32",
    )  # fmt: skip
    batches = Batches(random_text(VOCABULARY, 10_000), SEQ_LEN, ROWS)
    before = resident() - at_first
    with PeakMemory() as peak:
        in_parts(distill, student, teacher, batches, settings)
    return found | {"peak": before + peak.bytes} | by_formula(teacher, student)


def by_formula(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, float]:
    """What shrinks as 1 / n: parameters of both models, gradients and two moments; and the size of what processes
    gather, a layer and all that is in none (embeddings and head)."""
    sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, student)]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(student)]
    return {
        "shares": 4 * (sizes[0] + 4 * sizes[1]) / world(),
        "layer": 4 * max(layers),
        "root": 4 * (sizes[1] - sum(layers)),
    }


def child(folder: Path, mixer: str) -> None:
    """Measure among the other processes; the first one prints the largest numbers as JSON."""
    with joined():
        found = gathered(measured(folder, mixer))
        if rank() == 0:
            print(json.dumps({name: max(row[name] for row in found) for name in found[0]}))


def in_processes(count: int, folder: Path, mixer: str) -> dict[str, float]:
    """Measure in so many processes, which give memory back to the system as soon as they free it."""
    alone, several = (
        [sys.executable, "-m"],
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"],
    )
    command = [*alone, *(several if count > 1 else []), "experiments.shared_memory", "--folder", folder]
    threads = {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--mixer", mixer],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", default="400M", help="of the teacher, about: 100M, 400M")
    parser.add_argument("--mixer", default="linear", choices=MIXERS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a child
    args = parser.parse_args()
    if args.folder is not None:
        child(args.folder, args.mixer)
        return
    config = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=16,
        num_hidden_layers=max(1, round(number_of_tokens(args.parameters) / PER_LAYER)), max_position_embeddings=256,
        eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, title="MiB of a process above its start")
    columns = ("processes", "teacher", "student", "peak in training", "by formula, 1 / n", "all else")
    for column in columns:
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        console.print(f"{model.num_parameters():,} parameters, into {args.mixer}")
        model.save_pretrained(name)
        del model
        load_teacher("neox-nano").tokenizer.save_pretrained(name)
        trim_heap()
        for count in (1, 2, 4):
            found = in_processes(count, Path(name), args.mixer)
            found["rest"] = found["peak"] - found["shares"]
            row = (found[key] / MIB for key in ("teacher", "student", "peak", "shares", "rest"))
            table.add_row(str(count), *(f"{value:,.0f}" for value in row))
    console.print(table)
    console.print(f"a layer {found['layer'] / MIB:,.0f} MiB, embeddings and head {found['root'] / MIB:,.0f} MiB")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
