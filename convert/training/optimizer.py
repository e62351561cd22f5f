"""The optimizers of a stage."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.training.selectors import name_of, selected
from convert.training.settings import StageSettings

Optimizers = Callable[[PreTrainedModel], Sequence[Optimizer]]  # makes them for the parameters that require gradients


def optimizers_of(
    student: PreTrainedModel, settings: StageSettings, objective: nn.Module, make: Optimizers | None = None
) -> list[Optimizer]:
    """The optimizers of what `settings.trains` chooses, which is then all that requires gradients; AdamW, or what
    `make(student)` returns. Parameters that terms of the objective own join the last one, without weight decay."""
    choose(student, settings)
    optimizers = [adamw(student, settings)] if make is None else list(make(student))
    if own := list(objective.parameters()):
        optimizers[-1].add_param_group({"params": own, "weight_decay": 0.0})
    return optimizers


def choose(student: PreTrainedModel, settings: StageSettings) -> None:
    """Let the chosen parameters, and no others, require gradients."""
    chosen = {id(p) for p in selected(student, settings.trains)}
    if not chosen:
        raise UserError(
            f"The stage has nothing to train: {name_of(settings.trains)} selects no parameter of this student."
        )
    for p in student.parameters():
        p.requires_grad_(id(p) in chosen)


def adamw(student: PreTrainedModel, settings: StageSettings) -> AdamW:
    """AdamW over the parameters that require gradients, with weight decay on the matrices of linear layers alone."""
    matrices = {id(module.weight) for module in student.modules() if isinstance(module, nn.Linear)}
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def update(optimizers: Sequence[Optimizer], rate: float) -> None:
    """One step of all of them at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
