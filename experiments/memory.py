"""How much memory do the stages need? Each is measured in a process of its own; on a GPU where there is one.

python -m experiments.memory depth        # align at 6 and 24 layers: what the pass itself needs must not grow
python -m experiments.memory head         # distill with and without the chunked loss, on a vocabulary of 50 k
python -m experiments.memory pythia-1b    # two steps of each stage at pythia-1b's real shape, random weights
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from convert.cli import fail_in_words, whole_number
from convert.data.batches import Batches
from convert.data.text import Tokens
from convert.mixers import MIXERS
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training import STAGES
from convert.training.loop import Silent
from convert.training.settings import Settings
from kernels.machine import DEVICE, PeakMemory

COMMAND = """
import sys, torch
from convert.run import main
code = main(sys.argv[1:])
if torch.cuda.is_available():
    print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
sys.exit(code)
"""


def settings(
    stage: str, seq_len: int, batch_tokens: int, steps: int, loss_chunk: int = Settings.loss_chunk
) -> Settings:
    """Settings of a short stage."""
    objective, trains = (
        ("cosine_distance", "feature_maps") if stage == "align" else ("forward_kl", "all_but_embeddings")
    )
    return Settings(
        tokens=steps * batch_tokens,
        lr=1e-4,
        objective=Objective.of(objective),
        trains=trains,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        micro_tokens=batch_tokens,
        loss_chunk=loss_chunk,
    )


def random_text(vocabulary: int, length: int) -> Tokens:
    """One document of random tokens."""
    return Tokens(np.random.default_rng(0).integers(0, vocabulary, length), np.array([0]))


def measure(stage: str, config: PreTrainedConfig, mixer: str, one: Settings) -> int:
    """Peak memory in bytes above parameters, gradients and moments: a first step has allocated those."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        teacher = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        student = swap(AutoModelForCausalLM.from_config(config), mixer)
    batches = Batches(random_text(config.vocab_size, 4 * one.batch_tokens), one.seq_len, one.num_sequences)

    class Recorder(Silent):
        """Keeps the peak of each step but the first."""

        def __init__(self) -> None:
            self.peaks: list[int] = []
            self.peak: PeakMemory | None = None

        def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
            """Called after each step."""
            if self.peak is not None:
                self.peak.__exit__()
                self.peaks.append(self.peak.bytes)
            self.peak = PeakMemory(DEVICE).__enter__()

    recorder = Recorder()
    STAGES[stage](student, teacher, batches, one, track=recorder)
    return max(recorder.peaks)


def small(layers: int, vocabulary: int = 512) -> PreTrainedConfig:
    """Configuration of a small model with so many layers."""
    return AutoConfig.for_model(
        "gpt_neox",
        vocab_size=vocabulary,
        hidden_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=2048,
    )


def in_a_process(*words: object) -> dict[str, int]:
    """Run this experiment with these arguments in a process of its own; what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.memory", *map(str, words)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("depth", "head", "pythia-1b", "align", "distill"))
    parser.add_argument("numbers", nargs="*", type=whole_number(1, 2**30))
    parser.add_argument("--mixer", default="mamba2", choices=MIXERS)
    args = parser.parse_args()
    if args.what == "depth":
        for layers in (6, 24):
            print(
                f"align, {layers} layers: {in_a_process('align', layers)['peak'] / 1e6:,.0f} MB above parameters,"
                " gradients and moments"
            )
    elif args.what == "head":
        for chunk in (256, 1 << 30):
            name = f"chunks of {chunk} tokens" if chunk < 1 << 20 else "all logits at once"
            print(
                f"distill, {name}: {in_a_process('distill', chunk)['peak'] / 1e6:,.0f} MB above parameters, gradients"
                " and moments"
            )
    elif args.what == "align":
        print(
            json.dumps({"peak": measure("align", small(args.numbers[0]), args.mixer, settings("align", 512, 4096, 3))})
        )
    elif args.what == "distill":
        print(
            json.dumps(
                {
                    "peak": measure(
                        "distill",
                        small(2, 50_304),
                        args.mixer,
                        settings("distill", 512, 4096, 3, loss_chunk=args.numbers[0]),
                    )
                }
            )
        )
    else:
        pythia(args.mixer)


def pythia(mixer: str) -> None:
    """Run the command itself, from a folder with random weights."""
    config = read_config(resolve("pythia-1b"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pythia-1b-shape"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        from convert import load_teacher

        load_teacher("neox-nano").tokenizer.save_pretrained(folder)
        words = [
            folder,
            "--to",
            mixer,
            "--data",
            "stdlib",
            "--out",
            Path(name) / "run",
            "--seq-len",
            1024,
            "--batch-tokens",
            1024,
            "--wandb",
            "disabled",
        ]
        sets = ["align.tokens=2048", "distill.tokens=2048", "align.save_every=1e9", "distill.save_every=1e9"]
        subprocess.run(
            [sys.executable, "-c", COMMAND, *map(str, words), *(w for s in sets for w in ("--set", s))], check=True
        )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak resident memory of the run: {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
