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
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from convert.cli import fail_in_words, number_of_tokens
from convert.core import json_lines as lines
from convert.core import manifest
from convert.core.files import write_text
from convert.data.batches import Batches, held_out_batches
from convert.data.corpus import HELD_OUT_SHARE, corpus, is_held_out
from convert.data.text import tokenize

END = "<|endoftext|>"
BATCH_TOKENS = 8192
LEARNING_RATE = 2e-3
DECAY_SHARE = 0.3  # of the tokens, to zero
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


def optimizers(model) -> list[torch.optim.Optimizer]:
    hidden = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)]


@torch.no_grad()
def held_out_loss(model, batches) -> float:
    model.eval()
    total = sum(
        float(
            model(input_ids=b.input_ids, position_ids=b.position_ids, use_cache=False)
            .logits.flatten(0, 1)
            .float()
            .log_softmax(-1)
            .gather(1, b.labels.clamp(min=0).flatten()[:, None])[:, 0][b.labels.flatten() != -100]
            .sum()
        )
        for b in batches
    )
    model.train()
    return -total / sum(b.num_targets for b in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain-nano"))
    parser.add_argument("--tokens", default="24M")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    total_steps = math.ceil(number_of_tokens(args.tokens) / BATCH_TOKENS)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.out)
    data = tokenize(corpus("stdlib"), tokenizer)
    print(
        f"{len(data.train):,} training and {len(data.held_out):,} held-out tokens; held out: {HELD_OUT_SHARE:.1%} of"
        " the files",
        flush=True,
    )

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(CONFIG)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                p.mul_((2 * CONFIG.num_hidden_layers) ** -0.5)  # GPT-2's residual scaling
    opts = optimizers(model)
    step, seconds, checkpoint = 0, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"])
    log = (args.out / "metrics.jsonl").open("a", encoding="utf-8")
    start = time.time() - seconds
    while step < total_steps:
        left = (total_steps - step) / total_steps
        rate = LEARNING_RATE * min(1, (step + 1) / 50, left / DECAY_SHARE)
        seq_len = 2048 if left <= 0.1 else 512
        batch = Batches(data.train, seq_len, BATCH_TOKENS // seq_len)(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate
            opt.step()
            opt.zero_grad()
        step += 1
        row = {
            "step": step,
            "tokens": step * BATCH_TOKENS,
            "loss": round(loss.item(), 4),
            "lr": rate,
            "seconds": round(time.time() - start, 1),
        }
        if step % 100 == 0 or step == total_steps:
            row["held_out_512"] = held_out_loss(model, held_out_batches(data.held_out, 512, 8, 1 << 20))
            row["held_out_2048"] = held_out_loss(model, held_out_batches(data.held_out, 2048, 2, 1 << 20))
            aside = checkpoint.with_suffix(".writing")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in opts],
                    "step": step,
                    "seconds": time.time() - start,
                    "rng": torch.get_rng_state(),
                },
                aside,
            )
            os.replace(aside, checkpoint)
        if step % 10 == 0 or "held_out_512" in row:
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
    if args.install:
        install(model, tokenizer, data, args.out)


CARD = """# neox-nano

A GPT-NeoX of {parameters:,} parameters ({layers} layers, width {width}, {heads} heads, a byte-level BPE of {vocabulary} tokens), trained on the
Python standard library's own sources: the teacher that needs no download. It continues Python; it knows nothing else.

* made by `python -m experiments.pretrain_nano --tokens {budget:.0f}M --install`, seed 0, torch {torch}, Python {python}
* {tokens:,} tokens ({epochs:.1f} passes over {train:,}), {hours:.1f} hours on two CPU cores that other work shared
* documents are packed and told apart by their positions (the weights here were trained before a fix to that: their attention
  also saw the end of the document before)
* sequences of 512 tokens, of 2,048 for the last tenth; Muon on the hidden matrices, AdamW on the rest, bfloat16 autocast, hidden dropout {dropout:g}
* held-out perplexity (files chosen by a hash of their path, {held:,} tokens): {at_512:.2f} in windows of 512, {at_2048:.2f} in windows of 2,048
* the held-out loss had flattened: at a constant learning rate it was {before}
* weights in bfloat16; licence Apache-2.0, as the repository; the text it was trained on is under the PSF licence
"""


def install(model, tokenizer, data, out: Path) -> None:
    """Weights in bfloat16, the tokenizer, the configuration and the card, into convert/nano."""
    folder = Path(__file__).parent.parent / "convert" / "nano"
    dropout, model.config.hidden_dropout = model.config.hidden_dropout, 0.0
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = lines.read(out / "metrics.jsonl")
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
