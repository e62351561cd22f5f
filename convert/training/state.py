"""What the checkpoints of a stage hold: everything that training changes, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from convert.core.errors import UserError
from convert.core.processes import gathered, rank
from convert.objectives.base import LiveObjective


@dataclass(frozen=True)
class Changed:
    """All that training changes. Parameters may be shared out among processes; each then holds its rows."""

    student: nn.Module
    objective: LiveObjective
    optimizers: Sequence[Optimizer]
    average: AveragedModel | None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the student that are trained, by name."""
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers that training changes: means, variances and counts of batch norms."""
        return {
            f"{path}.{name}": buffer
            for path, module in self.student.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name, buffer in module.named_buffers()
        }

    def state(self) -> dict[str, Any]:
        """Return it as dictionaries of tensors: of each parameter its value and what its optimizer keeps of it; and
        the random numbers of every process."""
        kept = {p: s for optimizer in self.optimizers for p, s in optimizer.state.items()}
        parts = {name: {"value": p.detach()} | dict(kept.get(p, {})) for name, p in self.trained.items()}
        owned = {name: dict(kept.get(p, {})) for name, p in self.objective.named_parameters()}
        return {
            "parts": parts,
            "owned": owned,
            "buffers": self.buffers,
            "objective": dict(self.objective.state_dict()),
            "average": {} if self.average is None else dict(self.average.state_dict()),
            "rng": gathered(self._generators()),
        }

    @torch.no_grad()
    def put_back(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises UserError where it is of another stage, or of another version."""
        try:
            self._put_back(state)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise other_version(error) from error

    def _put_back(self, state: Mapping[str, Any]) -> None:
        trained, owned = self.trained, dict(self.objective.named_parameters())
        for kind, ours, theirs in (
            ("parts", trained, state["parts"]),
            ("owned", owned, state["owned"]),
            ("buffers", self.buffers, state["buffers"]),
        ):
            if differing := ours.keys() ^ theirs.keys():
                raise LookupError(f"{kind} differ in {', '.join(sorted(differing)[:3])}")
        for name, p in trained.items():
            p.copy_(state["parts"][name]["value"])
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name])
        self.objective.load_state_dict(state["objective"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        names = {p: ("parts", name) for name, p in trained.items()} | {p: ("owned", name) for name, p in owned.items()}
        for optimizer in self.optimizers:
            _load(optimizer, {p: state[kind][name] for p, (kind, name) in names.items()})
        if rank() < len(state["rng"]):  # a process that was not there has nothing to continue
            self._continue(state["rng"][rank()])

    @property
    def _device(self) -> torch.device:
        return next(iter(self.trained.values())).device

    def _generators(self) -> dict[str, Tensor]:
        """The state of the CPU's random numbers, and of the device's."""
        device, found = self._device, {"cpu": torch.get_rng_state()}
        if device.type != "cpu":
            found[device.type] = torch.get_device_module(device).get_rng_state(device)
        return found

    def _continue(self, generators: Mapping[str, Tensor]) -> None:
        device = self._device
        for kind, generator in generators.items():  # of a device that is not used here: nothing is left to continue
            if kind == "cpu":
                torch.set_rng_state(generator.cpu())
            elif kind == device.type:
                torch.get_device_module(device).set_rng_state(generator.cpu(), device)


def other_version(error: Exception) -> UserError:
    """The error of a checkpoint that lacks something, in words."""
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        "The checkpoint of an unfinished step must hold what this version of the package keeps; another version"
        f" wrote it ({found}). Go on with that version, or start again with --fresh."
    )


def _load(optimizer: Optimizer, kept: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
    """Give an optimizer what was kept of its parameters, on their devices as it wants that."""
    groups = optimizer.state_dict()["param_groups"]
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    fields = [{name: value for name, value in kept[p].items() if name != "value"} for p in ours]
    optimizer.load_state_dict({"state": {i: f for i, f in enumerate(fields) if f}, "param_groups": groups})
