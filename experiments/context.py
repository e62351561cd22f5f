"""What does a context cost: cache bytes, time to first token, tokens per second, of a teacher and its students side by side?

    python -m experiments.context runs/smollm2-135m-mla runs/smollm2-135m-gate-swa --lengths 1024,8192,32768

Bytes are those of the live cache after a real prefill, beside the formula. Lengths beyond the model's positions cost what they would cost; the text
would be no good. For latent attention also: decoding with absorbed matrices against keys and values made anew for every token.
The numbers go into context.json of each run.
"""

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from convert import load_teacher, measure
from convert.errors import UserError
from convert.mixers import MLA
from convert.model import ConvertedForCausalLM
from convert.plan import size
from convert.run import fail_in_words


@torch.no_grad()
def costs(model: PreTrainedModel, length: int, dtype: torch.dtype) -> dict:
    """`measure.context`, the formula, and of latent attention both ways to decode."""
    found, first, cache = measure.context(model, length, dtype)
    row = dataclasses.asdict(found) | {"formula": measure.formula_bytes(measure.cache_formula(model), length, dtype)}
    slots = model.slots() if isinstance(model, ConvertedForCausalLM) else {}
    mixers = [slot.mixer for slot in slots.values() if isinstance(slot.mixer, MLA)]
    return row | ({"absorbed": _absorbed_against_expanded(model, mixers, first, cache)} if mixers else {})


def _absorbed_against_expanded(model: ConvertedForCausalLM, mixers: list[MLA], token: torch.Tensor, cache: Cache) -> dict[str, float]:
    """Decoding from this cache both ways: the largest difference of the last logits, and the speeds."""
    logits, speed = {}, {}
    for how in ("absorbed", "expanded"):
        for mixer in mixers:
            mixer._is_absorbed_cheaper = lambda queries, tokens, how=how: how == "absorbed"
        logits[how], speed[how] = measure.decode(model, token, copy.deepcopy(cache))
    for mixer in mixers:
        del mixer._is_absorbed_cheaper
    worst = (logits["absorbed"] - logits["expanded"]).abs().max().item()
    return {"max_abs_logit": worst, "tokens_per_s": speed["absorbed"], "expanded_tokens_per_s": speed["expanded"]}


def show(console: Console, rows: list[dict]) -> None:
    table = Table(title=f"context, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("context", "model", "cache", "by formula", "of the teacher's", "first token", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    teacher = {row["length"]: row["bytes"] for row in rows if row["model"] == "teacher"}
    for row in rows:
        table.add_row(
            f"{row['length']:,}", row["model"], size(row["bytes"]), size(row["formula"]), f"{row['bytes'] / teacher[row['length']]:.1%}",
            f"{row['first_token_s']:.2f} s", f"{row['tokens_per_s']:.1f}",
        )  # fmt: skip
    console.print(table)
    for row in (row for row in rows if "absorbed" in row):
        found = row["absorbed"]
        console.print(
            f"{row['model']}, {row['length']:,} tokens: absorbed and expanded decoding differ by {found['max_abs_logit']:.2g} in the logits; "
            f"{found['tokens_per_s']:.2f} against {found['expanded_tokens_per_s']:.2f} tokens/s, "
            f"{found['tokens_per_s'] / found['expanded_tokens_per_s']:.2f} x",
            highlight=False,
        )


def teacher_of(run: Path) -> str:
    if not (run / "report.json").exists():
        raise UserError(f"A finished run has a report.json; {run} has none. Give a run folder, or repeat its convert.run command.")
    return json.loads((run / "report.json").read_text())["settings"]["teacher"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders of one teacher")
    parser.add_argument("--lengths", default="1024,8192,32768")
    args = parser.parse_args()
    if not all(length.isdecimal() and int(length) > 0 for length in args.lengths.split(",")):
        raise UserError(f"--lengths takes numbers of tokens, as 1024,8192; got {args.lengths!r}.")
    teachers = {teacher_of(run) for run in args.runs}
    if len(teachers) > 1:
        raise UserError(f"Students stand beside one teacher; these runs have {', '.join(sorted(teachers))}. Give those of one.")
    taught = load_teacher(teachers.pop())
    models = {"teacher": taught.model} | {run.name: load_teacher(str(run)).model for run in args.runs}
    lengths, rows = [int(length) for length in args.lengths.split(",")], []
    with tqdm(total=len(lengths) * len(models), desc="prefill and decode", unit="model", dynamic_ncols=True) as bar:
        for length in lengths:
            for name, model in models.items():
                rows.append({"model": name} | costs(model, length, taught.dtype))
                bar.write(json.dumps(rows[-1]))
                bar.update()
    show(Console(), rows)
    for run in args.runs:
        (run / "context.json").write_text(json.dumps([row for row in rows if row["model"] in ("teacher", run.name)], indent=1))


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
