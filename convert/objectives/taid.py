"""Distillation towards a target that moves from the student's own distribution to the teacher's (TAID, arXiv
2501.16937)."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.core.fields import Range
from convert.objectives.terms import LogitTerm


def taid(student_NV: Tensor, teacher_NV: Tensor, t: float) -> Tensor:
    """Cross-entropy of the student against softmax((1 - t) student + t teacher), [N] nats; no gradient flows through
    the target. Its gradient is zero at t = 0, and that of the forward KL at t = 1."""
    target = F.softmax(torch.lerp(student_NV.detach(), teacher_NV, t), -1)
    with torch.autocast(target.device.type, enabled=False):  # its dot would be in bfloat16
        return -torch.linalg.vecdot(target, F.log_softmax(student_NV, -1))


class Interpolation(nn.Module):
    """The state of the schedule: `t`, the loss of the step before (infinite at first), and the momentum of its relative
    change. In float64 on the CPU, where reading them waits for no device."""

    t: Tensor
    previous_loss: Tensor
    momentum: Tensor

    def __init__(self, t_start: float) -> None:
        super().__init__()
        for name, value in (("t", t_start), ("previous_loss", math.inf), ("momentum", 0.0)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64, device="cpu"))


@dataclass(frozen=True)
class TAID(LogitTerm):
    """Temporally adaptive interpolated distillation. Defaults are those of the official code (SakanaAI/TAID), whose
    runs start at 0.4 (Phi-3 to TinyLlama) and at 0.2 (Llama-2)."""

    t_start: Annotated[float, Range(0, 1)] = 0.4
    t_end: Annotated[float, Range(0, 1)] = 1.0
    alpha: Annotated[float, Range(0, 1)] = 5e-4  # step size of t
    beta: Annotated[float, Range(0, 0.999999)] = 0.99  # momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_end < self.t_start:
            raise UserError(f"taid: t rises from t_start to t_end; got {self.t_start:g} and {self.t_end:g}.")

    def build(self, student: nn.Module, teacher: nn.Module | None) -> Interpolation:
        return Interpolation(self.t_start)

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: Any) -> Tensor:
        return taid(student, teacher, float(owned.t))

    def advance(self, owned: nn.Module, loss: float, progress: float) -> None:
        """A falling loss moves t up faster than the line from `t_start` to `t_end`. The first step only notes
        its loss, as in the official code."""
        previous, t = float(owned.previous_loss), float(owned.t)
        owned.previous_loss.fill_(loss)
        if previous == math.inf:
            return
        change = (previous - loss) / (previous + 1e-15)
        momentum = self.beta * float(owned.momentum) + (1 - self.beta) * change
        line = self.t_start + (self.t_end - self.t_start) * progress
        owned.momentum.fill_(momentum)
        step = self.alpha * float(owned.momentum.sigmoid()) * (1 - t)
        owned.t.fill_(min(self.t_end, max(line, t + step)))
