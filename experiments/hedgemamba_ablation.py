"""Does the paper's ordering hold on neox-nano, and is the Mamba in it alive?

    python -m experiments.hedgemamba_ablation                  # three seeds, 400 k tokens each; resumable

Every variant sees the same number of tokens. "Alive": after training, one part of the full mixer alone is set back to
its start and perplexity measured again. "Beyond": perplexity and speed at lengths that training never saw."""

import argparse
import copy
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from convert import load_teacher, recipes
from convert.cli import fail_in_words, whole_number
from convert.core import json_lines
from convert.core.console import Console
from convert.data.batches import Batches, held_out_batches
from convert.data.corpus import corpus
from convert.data.text import TokenData, tokenize
from convert.evaluation.final_metrics import held_out
from convert.evaluation.perplexity import perplexity
from convert.models.catalog import resolve
from convert.models.loading import Teacher, read_config
from convert.models.swap import swap
from convert.objectives import Objective
from convert.training.align import align
from convert.training.distill import distill
from convert.training.settings import Settings

LENGTHS = (256, 512, 1024, 2048)
PAPER = Objective.of("cross_entropy")  # HedgeMamba's stage 2


@dataclass(frozen=True)
class Variant:
    """How one student of the ablation is trained."""

    mixer: str  # of the finished student
    share: float = 0.1  # of the tokens, for stage 1
    naive: bool = False  # q, k, v and the mixer start at random
    objective: Objective = Objective.of("forward_kl")


def variants(mixer: str) -> dict[str, Variant]:
    """Name -> variant, for a full mixer of this name."""
    return {
        "full, 10/90": Variant(mixer),
        "no stage 1, 0/100": Variant(mixer, share=0.0),
        "linear only, 10/90": Variant("linear"),
        "stage 1 only, 100/0": Variant(mixer, share=1.0),
        "naive direct KL": Variant(mixer, share=0.0, naive=True),
        "cross-entropy, 10/90": Variant(mixer, objective=PAPER),
        "cross-entropy, 0/100": Variant(mixer, share=0.0, objective=PAPER),
    }


def train(teacher: Teacher, text: TokenData, budget: recipes.Budget, variant: Variant) -> PreTrainedModel:
    """Train one student, by the stages themselves."""
    torch.manual_seed(budget.seed)
    student = swap(copy.deepcopy(teacher.model), "linear")
    plan = recipes.to_linear(budget).trainings  # of every target
    first, last = (
        dataclasses.replace(s, tokens=int(budget.tokens * part), evaluate_every=0, save_every=1e9)
        for s, part in zip(plan, (variant.share, 1 - variant.share), strict=True)
    )
    last = dataclasses.replace(last, objective=variant.objective)

    def batches(s: Settings) -> Batches:
        return Batches(text.train, s.seq_len, s.num_sequences, s.seed)

    if first.tokens:
        student = align(student, teacher.model, batches(first), first)
    if variant.mixer != "linear":
        student = swap(student, variant.mixer)
    if variant.naive:
        for slot in student.slots().values():
            for module in slot.modules():
                if isinstance(module, torch.nn.Linear):
                    module.reset_parameters()
    if last.tokens:
        student = distill(student, teacher.model, batches(last), last)
    return student.eval()


def reset(student: PreTrainedModel, part: str) -> PreTrainedModel:
    """A copy of the trained student with one part of every mixer as it was before training."""
    student = copy.deepcopy(student)
    with torch.no_grad():
        for slot in student.slots().values():
            fresh = type(slot.mixer)(slot.mixer.shape, slot.mixer.options)
            names = {
                "decay": "rate",
                "conv": "block.conv",
                "gate": "block.gate",
                "Delta": "block.time_step",
                "skip": "block.skip",
            }
            for name, value in slot.mixer.named_parameters():
                if name.startswith(names[part]):
                    value.copy_(fresh.get_parameter(name))
    return student


def beyond(model: PreTrainedModel, text: TokenData) -> dict[int, tuple[float, float]]:
    """Length -> (perplexity, tokens/s of a full pass), on the same tokens cut into windows of that length."""
    found = {}
    for length in LENGTHS:
        batches = held_out_batches(text.held_out, length, max(1, 4096 // length), 1 << 16)
        start = time.perf_counter()
        value = perplexity(model, batches)
        found[length] = (value, sum(b.input_ids.numel() for b in batches) / (time.perf_counter() - start))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--mixer", default="mamba2", choices=("mamba", "mamba2"))
    parser.add_argument("--tokens", type=whole_number(1, 10**14), default=400_000)
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/hedgemamba-ablation"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / f"{args.mixer}-{args.tokens}.jsonl"
    source = resolve(args.teacher)
    teacher, config = load_teacher(source), read_config(source)
    text = tokenize(corpus("stdlib"), teacher.tokenizer)
    json_lines.mend(results)
    done = json_lines.read(results)
    base = recipes.budget(source.name, config, args.tokens)
    batches = held_out(text, recipes.to_mamba(base, args.mixer))
    baseline = perplexity(teacher.model, batches)
    for seed in range(args.seeds):
        for name, variant in variants(args.mixer).items():
            if any(row["variant"] == name and row["seed"] == seed for row in done):
                continue
            print(f"{name}, seed {seed}")
            student = train(teacher, text, dataclasses.replace(base, seed=seed), variant)
            row = {"variant": name, "seed": seed, "perplexity": perplexity(student, batches), "teacher": baseline}
            if name == "full, 10/90":
                row["reset"] = {
                    part: perplexity(reset(student, part), batches)
                    for part in ("decay", "conv", "gate", "Delta", "skip")
                }
                row["beyond"] = beyond(student, text)
            json_lines.append(results, [row])
            done.append(json.loads(json.dumps(row)))
    show(done, baseline, beyond(teacher.model, text))


def show(rows: list[dict[str, Any]], baseline: float, teacher_beyond: dict[int, tuple[float, float]]) -> None:
    """Print the perplexities by variant, by part set back to its start, and by length."""
    console = Console()
    table = Table(
        "variant", "perplexity, each seed", "mean", "spread", "ratio to the teacher", title=f"teacher {baseline:.3f}"
    )
    for name in dict.fromkeys(row["variant"] for row in rows):
        values = [row["perplexity"] for row in rows if row["variant"] == name]
        table.add_row(name, *_spread(values), f"{statistics.mean(values) / baseline:.4f}")
    console.print(table)
    full = [row for row in rows if "reset" in row]
    table = Table("set back to its start", "perplexity, each seed", "mean", "spread")
    for part in full[0]["reset"]:
        table.add_row(part, *_spread([row["reset"][part] for row in full]))
    console.print(table)
    table = Table("length", "teacher", "student, each seed", "mean", "spread", "teacher tokens/s", "student tokens/s")
    for length, (value, speed) in teacher_beyond.items():
        seen = [row["beyond"][str(length)] for row in full]
        table.add_row(
            str(length),
            f"{value:.3f}",
            *_spread([s[0] for s in seen]),
            f"{speed:,.0f}",
            f"{statistics.median(s[1] for s in seen):,.0f}",
        )
    console.print(table)


def _spread(values: list[float]) -> tuple[str, str, str]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return ", ".join(f"{v:.3f}" for v in values), f"{statistics.mean(values):.3f}", f"{spread:.3f}"


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
