"""What an image classifier costs: parameters, multiply-accumulates, bytes of its weights, latency and throughput."""

import statistics
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.evaluation.classification import evaluating
from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.operations import cost_of_pass
from convert.runs.vision_schemas import ModelCost

BATCH = 64  # images whose throughput is measured
WARM_UP = 2  # passes before the clock starts
FEWEST, MOST = 3, 30  # passes of which the median is taken (ours)
SECONDS = 2.0  # after which no further pass begins (ours)


@torch.no_grad()
def cost(model: PreTrainedModel) -> ModelCost:
    """Cost of a model on the device that it is on, for images that are prepared already."""
    with evaluating(model):
        one, many = _pass_seconds(model, 1), _pass_seconds(model, BATCH)
        return ModelCost(
            parameters=sum(p.numel() for p in model.parameters()),
            macs=multiply_accumulates(model),
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
            latency_ms=1000 * one,
            images_per_s=BATCH / many,
        )


def multiply_accumulates(model: PreTrainedModel) -> int:
    """Multiply-accumulates of one image: half of the floating-point operations that torch counts."""
    with evaluating(model):
        return cost_of_pass(model)[0] // 2


def _images(model: PreTrainedModel, count: int) -> Tensor:
    wanted = preprocessing_of(model.config)
    return torch.zeros(count, wanted.channels, wanted.height, wanted.width, device=model.device, dtype=model.dtype)


def _pass_seconds(model: PreTrainedModel, count: int) -> float:
    """Median time of a pass of so many images."""
    images, found = _images(model, count), list[float]()
    started = time.perf_counter()
    for _ in range(WARM_UP):
        model(pixel_values=images)
    while len(found) < MOST and (len(found) < FEWEST or time.perf_counter() - started < SECONDS):
        before = _now(model)
        model(pixel_values=images)
        found.append(_now(model) - before)
    return statistics.median(found)


def _now(model: PreTrainedModel) -> float:
    """Seconds on a clock, after waiting for all work of the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
