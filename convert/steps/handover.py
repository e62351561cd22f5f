"""The hand-over check: a swap that theory calls exact must leave the logits as they were.

D width · T tokens
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.processes import first_says
from convert.models.access import hidden_states
from convert.models.sharding import copied, is_shared_out
from convert.steps.base import Session

TOKENS = 2048  # over which logits are compared (ours)
CHUNK = 256  # tokens whose logits are held at once


def checked(
    step: str,
    mixer: str,
    swapped: Callable[[PreTrainedModel], PreTrainedModel],
    student: PreTrainedModel,
    session: Session,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Swap, and compare the logits over 2,048 held-out tokens before and after. Raises UserError if they do not agree.

    Many layers can amplify the rounding of float32 beyond what is allowed: then the same comparison in float64, which
    leaves a real difference as it is, decides. For that `session.start()` makes the student from before once more."""
    domain = session.domain
    batch = domain.probe(session.data, min(TOKENS, student.config.max_position_embeddings)).to(student.device)
    length = batch.input_ids.numel()
    before, metric = hidden_states(student, batch), domain.measure(student, [batch])
    student = swapped(student)
    worst, largest = largest_change(student.get_output_embeddings(), before, hidden_states(student, batch))
    change = abs(domain.measure(student, [batch]) / metric - 1)
    found = {
        "tokens": length,
        "max_abs_logit": worst,
        "allowed": max(1e-4, 1e-5 * largest),
        "headline_change": change,
    }
    console.print(
        f"hand-over over {length:,} {domain.unit}: logits moved by {worst:.2g}, allowed {found['allowed']:.2g};"
        f" {domain.headline} by {change:.1e}",
        style="dim",
    )
    fine = first_says(worst <= found["allowed"])
    if not fine and student.device.type != "mps":  # which has no float64
        found["max_abs_logit_float64"] = _change_in_float64(swapped, session.start(), batch)
        fine = found["max_abs_logit_float64"] <= found["allowed"]
        console.print(f"in float64, without float32's rounding, by {found['max_abs_logit_float64']:.2g}", style="dim")
    if not first_says(fine and change < 1e-4):
        raise UserError(
            f"The hand-over to {mixer} must not change the function, and it did: {found}. If you set {step}.exact, or"
            " options that leave something out, take that back; otherwise this is a defect of ours."
        )
    return student, found


def largest_change(head: nn.Module, before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the largest change of the logits of two hidden states [1, T, D], and the largest logit. A swap leaves the
    head alone."""
    worst = largest = torch.zeros((), device=before.device)
    for a, b in zip(before[0].split(CHUNK), after[0].split(CHUNK), strict=True):
        a, b = head(a), head(b)
        worst, largest = torch.maximum(worst, (a - b).abs().max()), torch.maximum(largest, a.abs().max())
    return worst.item(), largest.item()


def _change_in_float64(
    swapped: Callable[[PreTrainedModel], PreTrainedModel], student: PreTrainedModel, batch: Any
) -> float:
    """Return the largest change of the logits by this swap of a student that is then of no more use. (Norms of some
    hosts still round to float32 there.)"""
    student = copied(student, torch.float64) if is_shared_out(student) else student.double()
    before = hidden_states(student, batch)
    torch.set_default_dtype(torch.float64)  # the new mixers' constants, too
    try:
        student = swapped(student)
    finally:
        torch.set_default_dtype(torch.float32)
    return largest_change(student.get_output_embeddings(), before, hidden_states(student, batch))[0]
