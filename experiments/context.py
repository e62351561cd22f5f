"""What does a long context cost, and what is it good for? Teacher and students side by side.

    python -m experiments.context runs/smollm2-135m-mla runs/smollm2-135m-gate-swa --lengths 1024,8192,32768

Costs: cache bytes, time to first token, tokens per second. Bytes are those of the live cache after a real prefill,
beside the formula. Lengths beyond the model's positions cost what they would cost; the text would be no good. Without
`--lengths` they grow fourfold from 1,024 until memory, or `--minutes` for one prefill, ends. For latent attention also:
decoding with absorbed matrices against keys and values made anew for every token. Use: perplexity by the number of
tokens before; whether one assignment in a long text is found, by its depth and the length; and the probes of RULER
(arXiv 2404.06654: several keys, several values, chains of assignments) by length. The numbers go into context.json of
each run, and into its report.html."""

import argparse
import copy
import dataclasses
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
from convert.evaluation.by_length import needles_found, probes_for, scores_by_length
from convert.evaluation.inference import cache_formula, context_cost, decoding_speed, formula_bytes
from convert.evaluation.perplexity import perplexity_by_position
from convert.mixers import MLA
from convert.models.cache import StateLayer, layer_bytes
from convert.models.loading import Teacher
from convert.models.student import ConvertedForCausalLM
from convert.planning.plan import free_memory
from convert.reports.language import LANGUAGE
from convert.reports.page import write_report_page
from convert.reports.sections import Run
from convert.runs.keys import ModelName
from convert.runs.language_schemas import AbsorbedDecoding, Context, MeasuredContext, Needle, Probe
from convert.runs.ledger import locked

DEPTHS = (0.1, 0.5, 0.9)
HELD_OUT = 1 << 16  # tokens of held-out text
Models = dict[str, PreTrainedModel]


# --- what it costs


@torch.no_grad()
def costs(model: PreTrainedModel, name: str, length: int, dtype: torch.dtype) -> MeasuredContext:
    """What a context of this length costs the model, by measurement and by formula; of latent attention both ways to
    decode."""
    found, logits, cache = context_cost(model, length, dtype)
    return MeasuredContext(
        **vars(found),
        model=_role(name),
        formula=formula_bytes(cache_formula(model), length, dtype),
        absorbed=_absorbed_against_expanded(model, logits, cache) if _latent(model) else None,
    )


def _role(name: str) -> ModelName:
    """What a model is in context.json, whose folder may get another name: the teacher, or a run's student."""
    return "teacher" if name == "teacher" else "student"


def _absorbed_against_expanded(model: PreTrainedModel, logits: torch.Tensor, cache: Cache) -> AbsorbedDecoding:
    """Compare both ways to decode from this cache: the largest difference of the last logits, and the speeds. Where
    float32 differs by more than 1e-4, the same in float64 if there is memory for it, which leaves a real difference as
    it is."""
    worst, speeds = _both_ways(model, logits, cache)
    in_float64 = None
    held = sum(layer_bytes(layer, torch.float64) for layer in cache.layers)
    # the model is copied and widened, a cache copied and grown
    needed = 12 * sum(p.numel() for p in model.parameters()) + 3 * held
    if worst > 1e-4 and model.device.type != "mps" and needed < free_memory(model.device):  # mps has no float64
        in_float64 = _both_ways(copy.deepcopy(model).double(), logits, _in_float64(cache))[0]
    return AbsorbedDecoding(
        max_abs_logit=worst,
        tokens_per_s=speeds["absorbed"],
        expanded_tokens_per_s=speeds["expanded"],
        max_abs_logit_float64=in_float64,
    )


def _both_ways(model: PreTrainedModel, logits: torch.Tensor, cache: Cache) -> tuple[float, dict[str, float]]:
    """The largest difference of the last logits, and tokens per second of each way."""
    mixers = _latent(model)
    last, speed = {}, {}
    for how in ("absorbed", "expanded"):
        for mixer in mixers:
            mixer._is_absorbed_cheaper = lambda queries, tokens, how=how: how == "absorbed"
        last[how], speed[how] = decoding_speed(model, logits, copy.deepcopy(cache))
    for mixer in mixers:
        del mixer._is_absorbed_cheaper
    return (last["absorbed"] - last["expanded"]).abs().max().item(), speed


def _latent(model: PreTrainedModel) -> list[MLA]:
    """The latent attention layers of a model."""
    slots = model.slots() if isinstance(model, ConvertedForCausalLM) else {}
    return [slot.mixer for slot in slots.values() if isinstance(slot.mixer, MLA)]


def _in_float64(cache: Cache) -> Cache:
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            layer.state = tuple(t.double() if t.is_floating_point() else t for t in layer.state)
        else:
            layer.keys, layer.values, layer.dtype = layer.keys.double(), layer.values.double(), torch.float64
    return cache


def all_costs(
    models: Models, lengths: list[int] | None, minutes: float, dtype: torch.dtype, say: Callable[[str], None]
) -> dict[str, list[MeasuredContext]]:
    """Name -> costs by length; each model stops where memory ends, or where a prefill would take longer than so many
    minutes."""
    rows: dict[str, list[MeasuredContext]] = {name: [] for name in models}
    for name, model in models.items():
        before: MeasuredContext | None = None
        for length in lengths or _growing():
            reason = None if lengths or before is None else _too_much(model, before, length, minutes)
            try:
                before = None if reason else costs(model, name, length, dtype)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's is not
                if "memory" not in str(error):
                    raise
                reason = "memory ends before"
            if reason or before is None:
                say(f"{name}: {length:,} tokens left out, {reason}")
                break
            rows[name].append(before)
            say(
                f"{name}, {length:,} tokens: {size(before.bytes)}, {before.time_to_first_token_s:.2f} s,"
                f" {before.tokens_per_s:.1f} tokens/s"
            )
    return rows


def _growing() -> Iterator[int]:
    length = 1024
    while True:
        yield length
        length *= 4


def _too_much(model: PreTrainedModel, before: MeasuredContext, length: int, minutes: float) -> str | None:
    """Whether this length would not fit, or take too long, going by the one before. A cache is copied once; its keys
    are float32."""
    times = length / before.length
    needed, there = 4 * times * before.bytes, free_memory(model.device)
    if needed > there:
        return f"about {size(needed)} needed, {size(there)} free"
    seconds = before.time_to_first_token_s * times**2
    return (
        f"about {duration(seconds)} for the prefill; --minutes allows {minutes:g} min"
        if seconds > 60 * minutes
        else None
    )


# --- what it is good for


def by_position(models: Models, teacher: Teacher, data: str) -> dict[str, dict[int, float]]:
    """Name -> perplexity by position, in the longest windows that the models have positions for."""
    text = tokenize(corpus(data), teacher.tokenizer).held_out
    length = min(min(model.config.max_position_embeddings for model in models.values()), len(text) - 1)
    batches = held_out_batches(text, length, 1, HELD_OUT)
    return {name: perplexity_by_position(model, batches) for name, model in models.items()}


def find_needles(models: Models, teacher: Teacher, lengths: list[int], each: int) -> dict[str, list[Needle]]:
    """Name -> the share of needles found by each scoring method, by length in tokens and depth; of `each` examples."""
    rows: dict[str, list[Needle]] = {name: [] for name in models}
    for name, length, depth, shares in needles_found(models, teacher.tokenizer, lengths, DEPTHS, each):
        rows[name].append(Needle(model=_role(name), length=length, depth=depth, **shares))
    return rows


def find_probes(models: Models, teacher: Teacher, lengths: list[int], count: int) -> dict[str, list[Probe]]:
    """Name -> scores on the probes by length in tokens; of `count` examples."""
    rows: dict[str, list[Probe]] = {name: [] for name in models}
    if count and lengths:
        tasks = probes_for(teacher.tokenizer)
        for name, task, length, scores in scores_by_length(models, teacher.tokenizer, tasks, lengths, count):
            rows[name].append(Probe(model=_role(name), task=task, length=length, n=count, **scores))
    return rows


# --- tables


def show(console: Console, rows: dict[str, list[MeasuredContext]]) -> None:
    """Print the costs by length and model."""
    table = Table(title=f"what a context costs, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("context", "model", "cache", "by formula", "of the teacher's", "time to first token", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    teacher = {row.length: row.bytes for row in rows["teacher"]}
    named = [(name, row) for name, some in rows.items() for row in some]
    for name, row in sorted(named, key=lambda pair: pair[1].length):
        share = f"{row.bytes / teacher[row.length]:.1%}" if row.length in teacher else ""
        seconds, speed = f"{row.time_to_first_token_s:.2f} s", f"{row.tokens_per_s:.1f}"
        table.add_row(f"{row.length:,}", name, size(row.bytes), size(row.formula), share, seconds, speed)
    console.print(table)
    for name, row in named:
        if (found := row.absorbed) is None:
            continue
        exactly = "" if found.max_abs_logit_float64 is None else f" (in float64 by {found.max_abs_logit_float64:.2g})"
        console.print(
            f"{name}, {row.length:,} tokens: absorbed and expanded decoding differ by {found.max_abs_logit:.2g} in"
            f" the logits{exactly}; {found.tokens_per_s:.2f} against {found.expanded_tokens_per_s:.2f} tokens/s,"
            f" {found.tokens_per_s / found.expanded_tokens_per_s:.2f} x",
            highlight=False,
        )


def show_probes(console: Console, found: dict[str, list[Probe]]) -> None:
    """Print the scores on the probes by length."""
    table = Table("probe", "length", *found, title="probes, % by generation / by likelihood", title_justify="left")
    cells = {
        (row.task, row.length, name): f"{row.generation:.0%} / {row.likelihood:.0%}"
        for name, rows in found.items()
        for row in rows
    }
    for task, length in dict.fromkeys(key[:2] for key in cells):
        table.add_row(task, f"{length:,}", *(cells[task, length, name] for name in found))
    if cells:
        console.print(table)


def show_use(console: Console, positions: dict[str, dict[int, float]], found: dict[str, list[Needle]]) -> None:
    """Print perplexity by position, and which needles were found."""
    table = Table("tokens before", *positions, title="perplexity by position", title_justify="left")
    keys = list(next(iter(positions.values())))
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        name = f"{key:,} to {following - 1:,}" if following else f"from {key:,}"
        table.add_row(name, *(f"{row[key]:.2f}" for row in positions.values()))
    console.print(table)
    if not any(found.values()):
        return
    table = Table(
        "length", "depth", *positions, title="needle found by generation / by likelihood", title_justify="left"
    )
    cells = {
        (row.length, row.depth, name): f"{row.generation:.0%} / {row.likelihood:.0%}"
        for name, rows in found.items()
        for row in rows
    }
    for length, depth in dict.fromkeys(key[:2] for key in cells):
        table.add_row(f"{length:,}", f"{depth:.0%}", *(cells[length, depth, name] for name in positions))
    console.print(table)


def numbers(text: str, flag: str) -> list[int]:
    """Read numbers of tokens, such as 1024,8192; UserError where they are none."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise UserError(f"{flag} takes numbers of tokens, as 1024,8192; got {shown(text)}.")
    return [int(length) for length in text.split(",")]


def main() -> None:
    """The command."""
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
    parser.add_argument(
        "--probe-lengths", default="256,512,1024,2048,4096", help="in tokens; those that the models have positions for"
    )
    parser.add_argument("--probes", type=whole_number(0, 10_000), default=8, help="for each probe and length; 0: none")
    args = parser.parse_args()
    lengths = numbers(args.lengths, "--lengths") if args.lengths else None
    settings = [Run.read(run).report.settings for run in args.runs]  # damage is said before anything is measured
    folders = [run.name for run in args.runs]
    if len({*folders, "teacher"}) <= len(folders):
        raise UserError(
            f"Runs are told apart by their folders' names, and teacher is none; these are {', '.join(folders)}. Rename"
            " some."
        )
    teachers = {each.teacher for each in settings}
    if len(teachers) > 1:
        raise UserError(
            f"Students stand beside one teacher; these runs have {', '.join(sorted(teachers))}. Give those of one."
        )
    teacher = load_teacher(teachers.pop())
    models = {"teacher": teacher.model} | {run.name: load_teacher(str(run.absolute())).model for run in args.runs}
    room = min(model.config.max_position_embeddings for model in models.values())
    hidden = (
        [length for length in numbers(args.needle_lengths, "--needle-lengths") if length <= room]
        if args.needles
        else []
    )
    probed = [length for length in numbers(args.probe_lengths, "--probe-lengths") if length <= room]
    rows = all_costs(models, lengths, args.minutes, teacher.dtype, lambda line: tqdm.write(line))
    positions = by_position(models, teacher, settings[0].data)
    found = find_needles(models, teacher, hidden, args.needles)
    probes = find_probes(models, teacher, probed, args.probes)
    show(Console(), rows)
    show_use(Console(), positions, found)
    show_probes(Console(), probes)
    for run in args.runs:
        mine = Context(
            costs=rows["teacher"] + rows[run.name],
            needles=found["teacher"] + found[run.name],
            probes=probes["teacher"] + probes[run.name],
            perplexity_by_position={
                _role(name): {str(start): value for start, value in positions[name].items()}
                for name in ("teacher", run.name)
            },
        )
        with locked(run), manifest.renewing(run, "context.json"):
            write_json(run / "context.json", dataclasses.asdict(mine))
        write_report_page(run, LANGUAGE)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
