"""A Swap step: what the layers see, which of them stay, the swap itself, and the check that an exact one is exact."""

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

from convert.core.errors import UserError
from convert.data.batches import Batch, Batches, held_out_batches
from convert.data.text import TokenData
from convert.evaluation.perplexity import perplexity as perplexity_of
from convert.models.student import ConvertedForCausalLM, swap
from convert.recipes.base import OneIn, Recipe, Swap, Train
from convert.recipes.language import HANDOVER_TOKENS, RANKING_TOKENS
from convert.steps import selection
from convert.steps.calibration import inputs_of
from convert.training.loop import hidden_states, layers_of


@torch.no_grad()
def do_swap(
    step: Swap, student, start: Callable, text: TokenData, recipe: Recipe, console: Console
) -> tuple[ConvertedForCausalLM, dict]:
    """The new student, and what was measured on the way: `layers` (kept, and the KL of each when edited alone),
    `handover` (how far logits moved). Consumes the old one; `start()` makes it once more."""
    num_layers = len(layers_of(student))
    inputs = inputs_of(student, _sequences(text, recipe, step.calibration)) if step.looks_first else None
    if isinstance(step.keep, OneIn) and step.keep.measured:
        return _keep_by_measurement(step, student, text, recipe, inputs, console)
    edited = step.edited(num_layers)
    found = {} if len(edited) == num_layers else {"layers": {"kept": [i for i in range(num_layers) if i not in edited]}}
    if step.exact:
        student, checked = _exact_swap(step, student, start, text, edited, inputs, console)
        return student, found | {"handover": checked}
    return swap(student, step.mixer, step.options, edited, inputs).eval(), found


def _keep_by_measurement(step: Swap, student, text: TokenData, recipe: Recipe, inputs, console: Console):
    """Edit all layers, put all back, and edit again all but those that cost most when they alone are edited: sizes that
    depend on all edited layers (a cache budget) are then shared out among these."""
    before = selection.parts_of(student)
    student = swap(student, step.mixer, step.options, inputs=inputs).eval()
    rises = selection.rises(student, before, _sequences(text, recipe, min(RANKING_TOKENS, recipe.tokens)))
    ranked = sorted(before, key=lambda layer: -rises[layer])
    kept = sorted(ranked[: step.keep.count(len(before))])
    selection.put(student, before)
    student = swap(
        student, step.mixer, step.options, tuple(layer for layer in before if layer not in kept), inputs
    ).eval()
    console.print(f"kept layers, those that cost most when edited alone: {', '.join(map(str, kept))}", style="dim")
    return student, {"layers": {"kept": kept, "kl_when_edited_alone": rises}}


def _sequences(text: TokenData, recipe: Recipe, tokens: int) -> list[Batch]:
    """So many tokens of training text, as the last stage has them."""
    last = [step.settings for step in recipe.steps if isinstance(step, Train)][-1]
    batches = Batches(text.train, last.seq_len, 1, last.seed)
    return [batches(i) for i in range(max(1, tokens // last.seq_len))]


def _exact_swap(
    step: Swap, student, start: Callable, text: TokenData, edited: tuple[int, ...], inputs, console: Console
):
    """Compare the logits over 2,048 tokens before and after, and stop if they do not agree.

    Many layers can amplify the rounding of float32 beyond what is allowed: then the same comparison in float64, which
    leaves a real difference as it is, decides. For that `start()` makes the student from before the swap once more."""
    length = min(HANDOVER_TOKENS, student.config.max_position_embeddings, len(text.held_out) - 1)
    batch = held_out_batches(text.held_out, length, 1, length)[0].to(student.device)
    before, perplexity = hidden_states(student, batch), perplexity_of(student, [batch])
    student = swap(student, step.mixer, step.options, edited, inputs).eval()
    worst, largest = _largest_change(student.get_output_embeddings(), before, hidden_states(student, batch))
    change = abs(perplexity_of(student, [batch]) / perplexity - 1)
    checked = {
        "tokens": length,
        "max_abs_logit": worst,
        "allowed": max(1e-4, 1e-5 * largest),
        "perplexity_change": change,
    }
    console.print(
        f"hand-over over {length:,} tokens: logits moved by {worst:.2g}, allowed {checked['allowed']:.2g}; perplexity"
        f" by {change:.1e}",
        style="dim",
    )
    fine = worst <= checked["allowed"]
    if not fine and student.device.type != "mps":  # which has no float64
        checked["max_abs_logit_float64"] = _largest_change_in_float64(step, start(), batch, edited, inputs)
        fine = checked["max_abs_logit_float64"] <= checked["allowed"]
        console.print(f"in float64, without float32's rounding, by {checked['max_abs_logit_float64']:.2g}", style="dim")
    if not (fine and change < 1e-4):
        raise UserError(
            f"The hand-over to {step.mixer} must not change the function, and it did: {checked}. If you set"
            f" {step.name}.exact, or options that leave something out, take that back; otherwise this is a defect of"
            " ours."
        )
    return student, checked


def _largest_change(head: nn.Module, before: Tensor, after: Tensor) -> tuple[float, float]:
    """Of the logits of two hidden states [1, T, D]; and the largest logit. A swap leaves the head alone."""
    worst = largest = 0.0
    for a, b in zip(before[0].split(256), after[0].split(256), strict=True):
        a, b = head(a), head(b)
        worst, largest = max(worst, (a - b).abs().max().item()), max(largest, a.abs().max().item())
    return worst, largest


def _largest_change_in_float64(step: Swap, student, batch: Batch, edited: tuple[int, ...], inputs) -> float:
    """Of the logits, by this swap of a student that is then of no more use. (Norms of some hosts still round to float32
    there.)"""
    before = hidden_states(student.double(), batch)
    torch.set_default_dtype(torch.float64)  # the new mixers' constants, too
    try:
        student = swap(student, step.mixer, step.options, edited, inputs).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    return _largest_change(student.get_output_embeddings(), before, hidden_states(student, batch))[0]
