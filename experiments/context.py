"""What does a long context cost, and what is it good for? Teacher and students side by side.

    python -m experiments.context runs/smollm2-135m-mla runs/smollm2-135m-gate-swa --lengths 1024,8192,32768

Costs: cache bytes, time to first token, tokens per second. Bytes are those of the live cache after a real prefill,
beside the formula. Lengths beyond the model's positions cost what they would cost; the text would be no good. Without
`--lengths` they grow fourfold from 1,024 until memory, or `--minutes` for one prefill, ends. For latent attention also:
decoding with absorbed matrices against keys and values made anew for every token. Use: perplexity by the number of
tokens before, and whether one assignment in a long text is found, by its depth and the length. The numbers go into
context.json of each run, and into its report.html."""

import argparse
import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from convert import load_teacher
from convert.cli import fail_in_words, real_number, whole_number
from convert.core import manifest
from convert.core.console import Console, duration, size
from convert.core.errors import UserError
from convert.core.fields import shown
from convert.core.files import write_json
from convert.data.batches import held_out_batches
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.evaluation import perplexity as measure
from convert.evaluation.scoring import READINGS, prompt_ids
from convert.evaluation.tasks import TASKS, Item, Task, needles
from convert.mixers import MLA
from convert.models.cache import StateLayer, layer_bytes
from convert.models.loading import Teacher
from convert.models.student import ConvertedForCausalLM
from convert.planning.plan import free_memory
from convert.reports.page import write_report_page
from convert.reports.sections import Run
from convert.runs.ledger import locked

DEPTHS = (0.1, 0.5, 0.9)
READ = 1 << 16  # tokens of held-out text
Models = dict[str, PreTrainedModel]


# --- what it costs


@torch.no_grad()
def costs(model: PreTrainedModel, length: int, dtype: torch.dtype) -> dict:
    """`measure.context`, the formula, and of latent attention both ways to decode."""
    found, first, cache = measure.context(model, length, dtype)
    row = dataclasses.asdict(found) | {"formula": measure.formula_bytes(measure.cache_formula(model), length, dtype)}
    return row | ({"absorbed": _absorbed_against_expanded(model, first, cache)} if _latent(model) else {})


def _absorbed_against_expanded(model: ConvertedForCausalLM, token: torch.Tensor, cache: Cache) -> dict[str, float]:
    """Decoding from this cache both ways: the largest difference of the last logits, and the speeds. Where float32
    differs by more than 1e-4, the same in float64 if there is memory for it, which leaves a real difference as it
    is."""
    worst, speeds = _both_ways(model, token, cache)
    found = {"max_abs_logit": worst, "tokens_per_s": speeds["absorbed"], "expanded_tokens_per_s": speeds["expanded"]}
    held = sum(layer_bytes(layer, torch.float64) for layer in cache.layers)
    needed = (
        12 * sum(p.numel() for p in model.parameters()) + 3 * held
    )  # the model is copied and widened, a cache copied and grown
    if worst > 1e-4 and model.device.type != "mps" and needed < free_memory(model.device):  # mps has no float64
        found["max_abs_logit_float64"] = _both_ways(copy.deepcopy(model).double(), token, _in_float64(cache))[0]
    return found


def _both_ways(model: ConvertedForCausalLM, token: torch.Tensor, cache: Cache) -> tuple[float, dict[str, float]]:
    mixers = _latent(model)
    logits, speed = {}, {}
    for how in ("absorbed", "expanded"):
        for mixer in mixers:
            mixer._is_absorbed_cheaper = lambda queries, tokens, how=how: how == "absorbed"
        logits[how], speed[how] = measure.decode(model, token, copy.deepcopy(cache))
    for mixer in mixers:
        del mixer._is_absorbed_cheaper
    return (logits["absorbed"] - logits["expanded"]).abs().max().item(), speed


def _latent(model: PreTrainedModel) -> list[MLA]:
    slots = model.slots() if isinstance(model, ConvertedForCausalLM) else {}
    return [slot.mixer for slot in slots.values() if isinstance(slot.mixer, MLA)]


def _in_float64(cache: Cache) -> Cache:
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            layer.state = layer.state._make(t.double() if t.is_floating_point() else t for t in layer.state)
        else:
            layer.keys, layer.values, layer.dtype = layer.keys.double(), layer.values.double(), torch.float64
    return cache


def all_costs(
    models: Models, lengths: list[int] | None, minutes: float, dtype: torch.dtype, say: Callable[[str], None]
) -> list[dict]:
    """Rows of `costs`; each model stops where memory or patience ends."""
    rows = []
    for name, model in models.items():
        before = None
        for length in lengths or _growing():
            reason = None if lengths or before is None else _too_much(model, before, length, minutes)
            try:
                before = None if reason else costs(model, length, dtype)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's is not
                if "memory" not in str(error):
                    raise
                reason = "memory ends before"
            if reason:
                say(f"{name}: {length:,} tokens left out, {reason}")
                break
            rows.append({"model": name} | before)
            say(
                f"{name}, {length:,} tokens: {size(before['bytes'])}, {before['first_token_s']:.2f} s,"
                f" {before['tokens_per_s']:.1f} tokens/s"
            )
    return rows


def _growing() -> Iterator[int]:
    length = 1024
    while True:
        yield length
        length *= 4


def _too_much(model: PreTrainedModel, before: dict, length: int, minutes: float) -> str | None:
    """Whether this length would not fit, or take too long, going by the one before. A cache is copied once; its keys
    are float32."""
    times = length / before["length"]
    needed, there = 4 * times * before["bytes"], free_memory(model.device)
    if needed > there:
        return f"about {size(needed)} needed, {size(there)} free"
    seconds = before["first_token_s"] * times**2
    return (
        f"about {duration(seconds)} for the prefill; --minutes allows {minutes:g} min"
        if seconds > 60 * minutes
        else None
    )


# --- what it is good for


def by_position(models: Models, taught: Teacher, data: str) -> dict[str, dict[int, float]]:
    """Name -> perplexity by position, in the longest windows that the models have positions for."""
    text = tokenize(corpus(data), taught.tokenizer).held_out
    length = min(min(model.config.max_position_embeddings for model in models.values()), len(text) - 1)
    batches = held_out_batches(text, length, 1, READ)
    return {name: measure.perplexity_by_position(model, batches) for name, model in models.items()}


def find_needles(models: Models, taught: Teacher, lengths: list[int], each: int) -> list[dict]:
    """Rows model, length (tokens), depth, and the share found by each reading."""
    task, rows = TASKS["needle"], []
    for length, (name, model) in (
        bar := tqdm(list(itertools.product(lengths, models.items())), desc="needles", unit="model")
    ):
        bar.set_description(f"needles, {length:,} tokens, {name}")
        items = [needle_of(taught.tokenizer, task, length, depth, seed) for seed in range(each) for depth in DEPTHS]
        right = {}
        for how, read in READINGS.items():
            right[how] = {a.item: a.right for batch in read(model, taught.tokenizer, task, items) for a in batch}
        for number, depth in enumerate(DEPTHS):
            mine = range(number, len(items), len(DEPTHS))
            shares = {how: sum(found[i] for i in mine) / each for how, found in right.items()}
            rows.append({"model": name, "length": length, "depth": depth} | shares)
    return rows


def needle_of(tokenizer, task: Task, length: int, depth: float, seed: int) -> Item:
    """A question that fills so many tokens, the room for its answer included, to nine tenths at least where the text
    allows it."""
    characters, best = 3 * length, None
    for _ in range(16):
        (item,) = needles(1, seed, (characters,), (depth,))
        tokens = len(prompt_ids(tokenizer, task, item.prompt)) + task.max_new_tokens
        if tokens <= length:
            best = item
            if tokens >= 0.9 * length:
                break
        characters = max(1, int(characters * 0.95 * length / tokens))
    if best is None:
        raise UserError(f"A needle needs more than {length} tokens; give larger --needle-lengths.")
    return best


# --- tables


def show(console: Console, rows: list[dict]) -> None:
    table = Table(title=f"what a context costs, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("context", "model", "cache", "by formula", "of the teacher's", "first token", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    teacher = {row["length"]: row["bytes"] for row in rows if row["model"] == "teacher"}
    for row in sorted(rows, key=lambda row: row["length"]):
        share = f"{row['bytes'] / teacher[row['length']]:.1%}" if row["length"] in teacher else ""
        table.add_row(
            f"{row['length']:,}",
            row["model"],
            size(row["bytes"]),
            size(row["formula"]),
            share,
            f"{row['first_token_s']:.2f} s",
            f"{row['tokens_per_s']:.1f}",
        )
    console.print(table)
    for row in (row for row in rows if "absorbed" in row):
        found = row["absorbed"]
        console.print(
            f"{row['model']}, {row['length']:,} tokens: absorbed and expanded decoding differ by"
            f" {found['max_abs_logit']:.2g} in the logits"
            + (f" (in float64 by {found['max_abs_logit_float64']:.2g}); " if "max_abs_logit_float64" in found else "; ")
            + f"{found['tokens_per_s']:.2f} against {found['expanded_tokens_per_s']:.2f} tokens/s, "
            f"{found['tokens_per_s'] / found['expanded_tokens_per_s']:.2f} x",
            highlight=False,
        )


def show_use(console: Console, positions: dict[str, dict[int, float]], found: list[dict]) -> None:
    table = Table("tokens before", *positions, title="perplexity by position", title_justify="left")
    keys = list(next(iter(positions.values())))
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        name = f"{key:,} to {following - 1:,}" if following else f"from {key:,}"
        table.add_row(name, *(f"{row[key]:.2f}" for row in positions.values()))
    console.print(table)
    if not found:
        return
    table = Table(
        "length", "depth", *positions, title="needle found: when it writes / when it ranks", title_justify="left"
    )
    cells = {
        (row["length"], row["depth"], row["model"]): f"{row['generation']:.0%} / {row['likelihood']:.0%}"
        for row in found
    }
    for length, depth in dict.fromkeys(key[:2] for key in cells):
        table.add_row(f"{length:,}", f"{depth:.0%}", *(cells[length, depth, name] for name in positions))
    console.print(table)


def numbers(text: str, flag: str) -> list[int]:
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise UserError(f"{flag} takes numbers of tokens, as 1024,8192; got {shown(text)}.")
    return [int(length) for length in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders of one teacher")
    parser.add_argument(
        "--lengths", help="of the contexts that are timed, as 1024,8192; default as far as memory and time go"
    )
    parser.add_argument(
        "--minutes", type=real_number(0.001, 1e6), default=2.0, help="that one prefill may take, without --lengths"
    )
    parser.add_argument(
        "--needle-lengths", default="512,1024,2048", help="in tokens; those that the models have positions for"
    )
    parser.add_argument("--needles", type=whole_number(0, 10_000), default=8, help="for each length and depth; 0: none")
    args = parser.parse_args()
    lengths = numbers(args.lengths, "--lengths") if args.lengths else None
    settings = [
        Run.read(run).report["settings"] for run in args.runs
    ]  # all that its page needs, before anything is measured
    names = [run.name for run in args.runs]
    if len({*names, "teacher"}) <= len(names):
        raise UserError(
            f"Runs are told apart by their folders' names, and teacher is none; these are {', '.join(names)}. Rename"
            " some."
        )
    teachers = {each["teacher"] for each in settings}
    if len(teachers) > 1:
        raise UserError(
            f"Students stand beside one teacher; these runs have {', '.join(sorted(teachers))}. Give those of one."
        )
    taught = load_teacher(teachers.pop())
    models = {"teacher": taught.model} | {run.name: load_teacher(str(run.absolute())).model for run in args.runs}
    room = min(model.config.max_position_embeddings for model in models.values())
    hidden = (
        [length for length in numbers(args.needle_lengths, "--needle-lengths") if length <= room]
        if args.needles
        else []
    )
    rows = all_costs(models, lengths, args.minutes, taught.dtype, lambda line: tqdm.write(line))
    positions = by_position(models, taught, settings[0]["data"])
    found = find_needles(models, taught, hidden, args.needles)
    show(Console(), rows)
    show_use(Console(), positions, found)
    for run in args.runs:
        who = {"teacher": "teacher", run.name: "student"}  # wherever the folder goes
        mine = {"costs": rows, "needles": found}
        mine = {
            key: [row | {"model": who[row["model"]]} for row in some if row["model"] in who]
            for key, some in mine.items()
        }
        mine["perplexity_by_position"] = {who[name]: positions[name] for name in who}
        with locked(run), manifest.renewing(run, "context.json"):
            write_json(run / "context.json", mine)
        write_report_page(run)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
