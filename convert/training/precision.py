"""The precision of matrix products. Parameters, optimizer moments, recurrent states and losses are always float32."""

import torch


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether matrix products are in bfloat16. "auto": where the device is fast at them."""
    # older versions of torch do not say: float32 then
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type != "cpu" or known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return precision == "bfloat16" or (precision == "auto" and fast)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(device, precision))
