"""What a pass of an image classifier computes, counted on one image."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.scans import operations_of, scans_of


@torch.no_grad()
def cost_of_pass(model: PreTrainedModel) -> tuple[int, int]:
    """Floating-point operations of a model in eval mode for one image, and the bytes that its modules put out on the
    way, which are about what a backward pass keeps. The model may be on the meta device; it stays in eval mode.

    Operations are those that torch counts: matrix products, convolutions and attention, which is computed as matrix
    products for it, since torch counts nothing of the operator that a CPU uses. Scans over places count by
    `operations_of` alone, whatever way they are computed."""
    wanted, put_out, of_scans = preprocessing_of(model.config), 0, 0

    def add(module: Any, inputs: Any, output: Any) -> None:
        nonlocal put_out
        put_out += 4 * output.numel() if isinstance(output, torch.Tensor) else 0

    def begin(scan: Any, given: Any) -> None:
        nonlocal of_scans
        of_scans += operations_of(scan, given) + counter.get_total_flops()

    def end(scan: Any, given: Any, output: Any) -> None:
        nonlocal of_scans
        of_scans -= counter.get_total_flops()

    hooks = [module.register_forward_hook(add) for module in model.modules() if not list(module.children())]
    for scan in scans_of(model):
        hooks += [scan.register_forward_pre_hook(begin), scan.register_forward_hook(end)]
    shape = 1, wanted.channels, wanted.height, wanted.width
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(pixel_values=torch.zeros(shape, device=model.device, dtype=model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() + of_scans, put_out
