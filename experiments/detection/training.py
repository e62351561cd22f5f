"""Training a detector, alone or beside a teacher, and what it costs on one thread."""

import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from convert.exporting.onnx import compare, write_program
from convert.exporting.onnx_int8 import latency_ms, quantise, session_of
from convert.models.vision.features import staged
from convert.objectives import Objective
from experiments.detection.detector import Detections, Detector, detected, detection_loss
from experiments.detection.precision import map50
from experiments.detection.scenes import Pairs

BATCH, LR, WARM_UP, WEIGHT_DECAY, CLIP = 16, 2e-3, 0.1, 0.05, 5.0  # ours; the paper: SGD, 300 epochs in batches of 8
CALIBRATION = 128  # images whose activations give the ranges of 8 bits (ours)


def train(detector: Detector, teacher: Detector | None, terms: str, pairs: Pairs, images: int, seed: int) -> None:
    """Train a detector on so many images, each as often as it comes round."""
    steps = max(1, images // BATCH)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    live = Objective.of(terms).build(detector.backbone, teacher.backbone, staged) if terms and teacher else None
    detector.train()
    for step in range(steps):
        rows = _rows(len(pairs), step, seed)
        bands = pairs.bands(rows)
        seen = detector.look(bands, scans=live is not None)
        loss = detection_loss(
            detector.heads(seen.stages), [pairs.boxes[i] for i in rows], [pairs.classes[i] for i in rows]
        )
        if live is not None and teacher is not None:
            with torch.no_grad():
                theirs = teacher.look(bands, scans=True)
            loss = loss + live.on_stages(seen, theirs, seen.logits.detach(), 1.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    detector.eval()


def _rows(count: int, step: int, seed: int) -> list[int]:
    """The images of a step: all of them in an order drawn anew for each round."""
    places = range(step * BATCH, (step + 1) * BATCH)
    return [int(_order(count, place // count, seed)[place % count]) for place in places]


@functools.lru_cache(maxsize=2)
def _order(count: int, round_: int, seed: int) -> NDArray:
    return np.random.default_rng([seed, round_]).permutation(count)


@torch.no_grad()
def found_by(detector: Detector, pairs: Pairs) -> list[Detections]:
    """What a detector finds in all pairs."""
    parts = [range(start, min(start + 50, len(pairs))) for start in range(0, len(pairs), 50)]
    return [each for part in parts for each in detected(detector(pairs.bands(part)))]


def on_the_edge(detector: Detector, pairs: Pairs, held_out: Pairs) -> dict[str, float]:
    """Bytes, milliseconds for one image on one thread, and precision, as an ONNX file and in 8 bits."""
    numbers: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        plain, int8 = Path(place, "plain.onnx"), Path(place, "int8.onnx")
        write_program(detector, pairs.bands([0, 1]), plain, "detector", output="grid")
        compare(detector, plain, tuple(pairs.bands([0]).shape[1:]))
        quantise(plain, int8, [pairs.bands([i]).numpy() for i in range(min(CALIBRATION, len(pairs)))])
        for name, file in (("", plain), ("int8_", int8)):
            session, grids = session_of(file), []
            for i in range(0, len(held_out), 50):
                rows = range(i, min(i + 50, len(held_out)))
                grids.append(torch.from_numpy(session.run(None, {"images": held_out.bands(rows).numpy()})[0]))
            numbers |= {
                f"{name}bytes": file.stat().st_size,
                f"{name}ms": latency_ms(session, held_out.bands([0]).numpy()),
                f"{name}map50": map50([each for grid in grids for each in detected(grid)], held_out),
            }
    return numbers
