"""The devices of this machine."""

import os

import torch

from convert.core.errors import UserError
from convert.core.fields import checked, shown
from convert.core.processes import launched


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
    """The device to use: "auto" stands for the best one here, any other name for itself. Of several processes that
    torchrun started each uses the GPU of its number on its machine."""
    if launched() > 1 and device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"Under torchrun each process takes a device of its own, so --device must be auto, cpu or cuda; got"
            f" {shown(device)}. Leave it out."
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if launched() > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if int(device.split(":")[1]) >= torch.cuda.device_count():
            raise UserError(
                f"Each process needs a GPU of its own; this machine has {torch.cuda.device_count()}, and one process"
                f" wants {device}. Give torchrun a smaller --nproc-per-node."
            )
        torch.cuda.set_device(device)
    check_device(device)
    return device
