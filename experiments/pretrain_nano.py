"""Train the embedded teacher: a small GPT-NeoX on the Python standard library's sources.

    python -m experiments.pretrain_nano --out runs/pretrain-nano --tokens 24M

Resumable: the same command goes on where it stopped. Hidden matrices are trained by Muon, the rest by AdamW; the
sequence length goes from 512 to 2,048 tokens for the last tenth, which is also where the learning rate falls.
With --install the weights, the tokenizer and the card replace those in convert/nano.
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor as TorchTensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from convert.cli import fail_in_words, number_of_tokens
from convert.core import json_lines, manifest
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.data.batches import Batch, Batches, held_out_batches
from convert.data.corpus import HELD_OUT_SHARE, corpus, is_held_out
from convert.data.text import TokenData, tokenize
from convert.evaluation.perplexity import perplexity
from convert.objectives import Objective
from convert.training.settings import Settings
from convert.training.supervised import supervised

END = "<|endoftext|>"
BATCH_TOKENS = 8192
LEARNING_RATE = 2e-3
DECAY_SHARE = 0.3  # of the tokens, to zero
WARMUP_STEPS = 50
LONG_SHARE = 0.1  # of the tokens, at the end, in sequences of 2,048
CONFIG = GPTNeoXConfig(
    vocab_size=4096, hidden_size=192, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768,
    max_position_embeddings=2048, rotary_pct=0.25, use_parallel_residual=True, bos_token_id=0, eos_token_id=0,
    hidden_dropout=0.05, tie_word_embeddings=False,
)  # fmt: skip


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training documents."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((text for key, text in corpus("stdlib").documents() if not is_held_out(key)), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            model_max_length=2048,
            padding_side="left",
        ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@dataclass(frozen=True)
class Schedule(Settings):
    """The settings, with this experiment's own schedule of the learning rate."""

    def rate(self, step: int) -> float:
        """The learning rate goes up in a fixed number of steps, constant, and down to zero in a straight line."""
        return self.lr * min(1, (step + 1) / WARMUP_STEPS, self.left(step) / DECAY_SHARE)

    def left(self, step: int) -> float:
        """The share of the steps that are left before this one is taken."""
        return (self.num_steps - step) / self.num_steps


def settings_of(tokens: int) -> Schedule:
    """All logits of a batch are held at once."""
    return Schedule(
        tokens=tokens, lr=LEARNING_RATE, objective=Objective.of("cross_entropy"), trains="everything", seq_len=512,
        batch_tokens=BATCH_TOKENS, micro_tokens=BATCH_TOKENS, precision="bfloat16", loss_chunk=BATCH_TOKENS,
    )  # fmt: skip


def new_model() -> GPTNeoXForCausalLM:
    """The teacher before its first step."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(CONFIG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                p.mul_((2 * CONFIG.num_hidden_layers) ** -0.5)  # GPT-2's residual scaling
    return model


def optimizers(model: GPTNeoXForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    hidden = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)]


def batches_of(data: TokenData, settings: Schedule) -> Callable[[int], Batch]:
    """Short sequences first, long ones for the last steps, as many tokens in each batch."""

    def batch(step: int) -> Batch:
        seq_len = 2048 if settings.left(step) <= LONG_SHARE else 512
        return Batches(data.train, seq_len, BATCH_TOKENS // seq_len)(step)

    return batch


def held_out_losses(model: GPTNeoXForCausalLM, data: TokenData) -> dict[str, float]:
    """Nats per token of held-out text in short and in long windows. Leaves the model in training mode."""
    model.eval()
    windows = {"held_out_512": (512, 8), "held_out_2048": (2048, 2)}
    found = {
        name: math.log(perplexity(model, held_out_batches(data.held_out, seq_len, count, 1 << 20)))
        for name, (seq_len, count) in windows.items()
    }
    model.train()
    return found


@dataclass
class Folder:
    """Logs a training into OUT/metrics.jsonl and keeps its newest checkpoint in OUT/checkpoint.pt."""

    out: Path
    num_steps: int
    measure: Callable[[], dict[str, float]]

    @property
    def rows(self) -> Path:
        return self.out / "metrics.jsonl"

    def resume(self, step: int) -> None:
        json_lines.keep(self.rows, lambda row: row["step"] <= step)

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        row = {
            "step": step,
            "tokens": tokens,
            "loss": round(numbers["train/loss"], 4),
            "lr": numbers["train/lr"],
            "seconds": round(numbers["train/seconds"], 1),
        }
        if step % 100 == 0 or step == self.num_steps:
            row |= self.measure()
        if step % 10 == 0 or "held_out_512" in row:
            json_lines.append(self.rows, [row])
            print(json.dumps(row), flush=True)

    def load(self, like: Mapping[str, TorchTensor] | None = None) -> dict | None:
        checkpoint = self.out / "checkpoint.pt"
        return torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None

    def save(self, step: int, state: dict) -> None:
        aside = self.out / "checkpoint.writing"
        torch.save(state, aside)
        os.replace(aside, self.out / "checkpoint.pt")

    def stop_requested(self) -> bool:
        return False


def pretrain(out: Path, tokens: int, data: TokenData) -> GPTNeoXForCausalLM:
    """The trained model, which is then in OUT/model; goes on from where an earlier call stopped."""
    settings, finished = settings_of(tokens), out / "model"
    out.mkdir(parents=True, exist_ok=True)
    if finished.exists():
        seen = json_lines.read(out / "metrics.jsonl")[-1]["tokens"]
        if seen != settings.num_steps * BATCH_TOKENS:
            raise UserError(f"{finished} was trained on {seen:,} tokens. Repeat that number, or give another --out.")
        return GPTNeoXForCausalLM.from_pretrained(finished)
    model = new_model()
    folder = Folder(out, settings.num_steps, lambda: held_out_losses(model, data))
    supervised(model, None, batches_of(data, settings), settings, track=folder, keep=folder, optimizers=optimizers)
    aside = out / "model.writing"
    model.save_pretrained(aside)
    aside.rename(finished)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain-nano"))
    parser.add_argument("--tokens", default="24M")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    tokens = number_of_tokens(args.tokens)
    tokenizer = train_tokenizer(args.out)
    data = tokenize(corpus("stdlib"), tokenizer)
    print(
        f"{len(data.train):,} training and {len(data.held_out):,} held-out tokens; held out: {HELD_OUT_SHARE:.1%} of"
        " the files",
        flush=True,
    )
    model = pretrain(args.out, tokens, data)
    if args.install:
        install(model, tokenizer, data, args.out)


CARD = """# neox-nano

A GPT-NeoX of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, a byte-level BPE of {vocabulary}
tokens), trained on the Python standard library's own sources: the teacher that needs no download. It continues Python;
it knows nothing else.

* made by `python -m experiments.pretrain_nano --tokens {budget:.0f}M --install`, seed 0, torch {torch}, Python {python}
* {tokens:,} tokens ({epochs:.1f} passes over {train:,}), {hours:.1f} hours on two CPU cores that other work shared
* documents are packed and told apart by their positions (the weights here were trained before a fix to that: their
  attention also saw the end of the document before)
* sequences of 512 tokens, of 2,048 for the last tenth; Muon on the hidden matrices, AdamW on the rest, bfloat16
  autocast, hidden dropout {dropout:g}
* held-out perplexity (files chosen by a hash of their path, {held:,} tokens): {at_512:.2f} in windows of 512,
  {at_2048:.2f} in windows of 2,048
* the held-out loss had flattened: at a constant learning rate it was {before}
* weights in bfloat16; licence Apache-2.0, as the repository; the text it was trained on is under the PSF licence
"""


def install(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, data: TokenData, out: Path) -> None:
    """Weights in bfloat16, the tokenizer, the configuration and the card, into convert/nano."""
    folder = Path(__file__).parent.parent / "convert" / "nano"
    dropout, model.config.hidden_dropout = model.config.hidden_dropout, 0.0
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = json_lines.read(out / "metrics.jsonl")
    measured = [row for row in rows if "held_out_512" in row]
    constant = [row for row in measured if row["lr"] == LEARNING_RATE][-4:]
    last, config = measured[-1], model.config
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        budget=last["tokens"] / 1e6,
        torch=torch.__version__,
        python=platform.python_version(),
        tokens=last["tokens"],
        epochs=last["tokens"] / len(data.train),
        train=len(data.train),
        hours=last["seconds"] / 3600,
        dropout=dropout,
        held=len(data.held_out),
        at_512=math.exp(last["held_out_512"]),
        at_2048=math.exp(last["held_out_2048"]),
        before=", ".join(f"{row['held_out_512']:.3f} nats at {row['tokens'] / 1e6:.1f} M tokens" for row in constant),
    )
    write_text(folder / "README.md", card)
    manifest.record(folder.parent, folder.name)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
