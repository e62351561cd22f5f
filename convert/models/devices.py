"""The devices of this machine."""

import torch

from convert.core.errors import UserError
from convert.core.fields import checked, shown


@checked
def check_device(device: str) -> torch.device:
    """The device of that name; raises UserError where this machine has none."""
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in there:
        raise UserError(f"The device must be one that this machine has ({', '.join(there)}); got {shown(device)}.")
    return torch.device(device)


@checked
def pick_device(device: str) -> str:
    """The device to use: "auto" stands for the best one here, any other name for itself."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device
