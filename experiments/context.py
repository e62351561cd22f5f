"""What does a context cost: cache bytes, time to first token, tokens per second, of a run's teacher and student side by side?

    python -m experiments.context runs/smollm2-135m-mla --lengths 1024,8192,32768

Bytes are those of the live cache after a real prefill, beside the formula. Lengths beyond the model's positions cost what they would cost; the text
would be no good. For latent attention also: decoding with absorbed matrices against keys and values made anew for every token.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from convert import load_teacher, measure
from convert.errors import UserError
from convert.mixers import MLA
from convert.model import ConvertedForCausalLM, layer_bytes
from convert.plan import size

DECODED = 16  # tokens, after two that warm up


@torch.no_grad()
def costs(model, length: int, dtype: torch.dtype) -> dict[str, float]:
    """Of one sequence of `length` tokens: bytes, seconds to the first token, tokens per second after it."""
    ids = torch.randint(10, model.config.vocab_size - 10, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    started = time.perf_counter()
    logits, cache = measure.prefill(model, ids)
    token = logits[:, -1:].argmax(-1)
    found = {"first_token_s": time.perf_counter() - started, "bytes": sum(layer_bytes(layer, dtype) for layer in cache.layers)}
    _decode(model, token, cache, 2)
    started = time.perf_counter()
    _decode(model, token, cache, DECODED)
    return found | {"tokens_per_s": DECODED / (time.perf_counter() - started)}


def _decode(model, token, cache, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return logits


@torch.no_grad()
def absorbed_against_expanded(student: ConvertedForCausalLM, length: int) -> dict[str, float]:
    """Decoding after `length` tokens both ways: the largest difference of the logits, and the speeds."""
    ids = torch.randint(10, student.config.vocab_size - 10, (1, length), generator=torch.Generator().manual_seed(0)).to(student.device)
    mixers = [slot.mixer for slot in student.slots().values() if isinstance(slot.mixer, MLA)]
    logits, speed = {}, {}
    for how in ("absorbed", "expanded"):
        first, cache = measure.prefill(student, ids)
        for mixer in mixers:
            mixer._is_absorbed_cheaper = lambda queries, tokens, how=how: how == "absorbed"
        try:
            token = first[:, -1:].argmax(-1)
            logits[how] = _decode(student, token, cache, 2)
            started = time.perf_counter()
            _decode(student, token, cache, DECODED)
            speed[how] = DECODED / (time.perf_counter() - started)
        finally:
            for mixer in mixers:
                del mixer._is_absorbed_cheaper
    return {
        "max_abs_logit": (logits["absorbed"] - logits["expanded"]).abs().max().item(), "absorbed_tokens_per_s": speed["absorbed"],
        "expanded_tokens_per_s": speed["expanded"], "ratio": speed["absorbed"] / speed["expanded"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--lengths", default="1024,8192,32768")
    args = parser.parse_args()
    if not (args.run / "report.json").exists():
        raise UserError(f"A finished run has a report.json; {args.run} has none.")
    settings = json.loads((args.run / "report.json").read_text())["settings"]
    taught, student = load_teacher(settings["teacher"]), load_teacher(str(args.run)).model
    console, rows = Console(), []
    table = Table("context", title=f"{args.run.name}, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("model", "cache", "by formula", "of the teacher's", "first token", "tokens/s"):
        table.add_column(column, justify="right")
    for length in map(int, args.lengths.split(",")):
        teacher_bytes = None
        for who, model in (("teacher", taught.model), ("student", student)):
            row = {"length": length, "model": who} | costs(model, length, taught.dtype)
            row["formula"] = measure.formula_bytes(measure.cache_formula(model), length, taught.dtype)
            teacher_bytes = teacher_bytes or row["bytes"]
            rows.append(row)
            console.print(f"[dim]{row}[/]")
            share = f"{row['bytes'] / teacher_bytes:.1%}"
            first = f"{row['first_token_s']:.2f} s"
            table.add_row(f"{length:,}", who, size(row["bytes"]), size(row["formula"]), share, first, f"{row['tokens_per_s']:.1f}")
        if any(isinstance(slot.mixer, MLA) for slot in student.slots().values()):
            rows.append({"length": length, "model": "student"} | absorbed_against_expanded(student, length))
            found = rows[-1]
            console.print(
                f"{length:,} tokens, absorbed against expanded: logits differ by {found['max_abs_logit']:.2g}; "
                f"{found['absorbed_tokens_per_s']:.1f} against {found['expanded_tokens_per_s']:.1f} tokens/s, {found['ratio']:.2f} x"
            )
    console.print(table)
    (args.run / "context.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
