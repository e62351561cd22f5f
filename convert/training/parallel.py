"""A stage in several processes: the student's parameters, gradients and moments shared out among them by FSDP2, each
process on its part of every batch. In one process everything here is the identity.

A stage divides its losses by the tokens of the whole batch, so gradients are summed over processes, never averaged.
Every process draws the whole batch and takes whole micro-batches of it, so that a batch is the same one however many
processes there are, and nothing must divide. What is not shared out (an image classifier, what terms of an objective
own) is a replica in each process, whose gradients are summed.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.processes import launched, share, sum_in_place, summed, world
from convert.models.access import layers_of
from convert.models.sharding import copied, is_shared_out, whole

Stage = Callable[..., PreTrainedModel]


class Boundless:
    """The batch as a part sees it that does not count: its share of so much is nothing."""

    num_tokens = num_targets = num_units = math.inf


def shares(batch: Any, num_units: int) -> list[tuple[int, Any, Any]]:
    """This process's micro-batches of at most `num_units`: how many come after each, the part, and the batch whose
    share it is. All processes get equally many, for each runs the same sums at the same time; of the ones that are
    missing the share is zero."""
    parts = batch.parts(num_units) if world() == 1 else batch.parts(num_units, world())
    return [(len(parts) - 1 - i, part, batch if counts else Boundless) for i, part, counts in share(parts)]


# --- a student that is shared out


def in_parts(stage: Stage, student: PreTrainedModel, *args: Any, **settings: Any) -> PreTrainedModel:
    """Run a stage with its student shared out; return the trained student, which still is. In one process: the stage
    itself. The student given is consumed."""
    if world() == 1:
        return stage(student, *args, **settings)
    with warnings.catch_warnings():
        # what it warns of is a sum in place onto a mixer's output; hosts add theirs out of place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return stage(student if is_shared_out(student) else copied(student), *args, **settings)


def check_shared_out(student: nn.Module) -> None:
    """Raise RuntimeError where a student is shared out and one of its parameters is a gathered copy."""
    copies = [name for name, p in student.named_parameters() if not isinstance(p, DTensor)]
    if copies and is_shared_out(student):
        raise RuntimeError(f"a stage would train gathered copies, which are thrown away: {copies[0]} and others")


def floats_held(model: PreTrainedModel, num_trained: int = 0) -> float:
    """Floats that a process holds of a model that is shared out, of which so many parameters are trained: its part of
    parameters, gradients and two moments, with the root and two layers gathered, of which one comes while the other
    runs, and their gradients. In one process all of it."""
    total = sum(p.numel() for p in model.parameters())
    if launched() == 1:
        return total + 3 * num_trained
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    gathered = (2 if num_trained else 1) * (total - sum(layers) + 2 * max(layers))
    return gathered + (total + 3 * num_trained) / launched()


# --- sums over the processes


def sum_replicas(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of parameters that each process has whole; those that no process has stay without."""
    if world() == 1:
        return
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if not plain:
        return
    found = summed(*(p.grad is not None for p in plain))
    for p, count in zip(plain, found, strict=True):
        if count:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            sum_in_place(p.grad)


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients down to a norm of at most `largest`; return the norm that they had, on their device."""
    if world() == 1:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if isinstance(g, DTensor) is is_shared] for is_shared in (True, False)]
    norm = torch.stack([norm_of(kind) for kind in kinds if kind]).double().norm() if gradients else torch.zeros(())
    for gradient in gradients:
        gradient.mul_((largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of tensors that are all shared out, or all whole."""
    return whole(torch.nn.utils.get_total_norm(list(tensors)))


class Statistics:
    """Means and variances of batch norms over the micro-batches of a step, as one process that runs them one after
    another leaves them, though each process runs some of them."""

    def __init__(self, student: nn.Module) -> None:
        modules = (m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.norms = [m for m in modules if m.track_running_stats] if world() > 1 else []
        if any(norm.momentum is None for norm in self.norms):
            raise UserError(
                "Batch norms that average over all batches, without a momentum, cannot be trained by several processes;"
                " start without torchrun."
            )
        self.before = [[buffer.clone() for buffer in norm.buffers()] for norm in self.norms]
        self.moved = [[torch.zeros_like(b, dtype=torch.float64) for b in buffers] for buffers in self.before]

    def note(self, num_later: int, counts: bool) -> None:
        """Note what a micro-batch did to them, and take it back. Each later one leaves 1 - momentum of it."""
        for norm, before, moved in zip(self.norms, self.before, self.moved, strict=True):
            left = (1 - norm.momentum) ** num_later
            for buffer, old, total in zip(norm.buffers(), before, moved, strict=True):
                if counts:
                    total += (buffer - old).double() * (left if buffer.is_floating_point() else 1)
                buffer.copy_(old)

    def sum(self) -> None:
        """Set them to what all micro-batches of all processes made of them."""
        for norm, before, moved in zip(self.norms, self.before, self.moved, strict=True):
            for buffer, old, total in zip(norm.buffers(), before, moved, strict=True):
                sum_in_place(total)
                buffer.copy_(old + total.to(buffer.dtype))
