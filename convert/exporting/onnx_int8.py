"""An ONNX file with weights and activations of 8 bits, by onnxruntime's own quantiser, and how fast files are."""

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

PRODUCTS = ["MatMul", "Gemm", "Conv"]
WARM_UP, FEWEST, MOST, SECONDS = 3, 10, 200, 2.0  # passes of which the median is taken, and when no other begins (ours)


def quantise(file: Path, out: Path, images: Sequence[NDArray]) -> None:
    """Write `file` with weights and activations of matrix products and convolutions in 8 bits. The ranges of
    activations are those of `images`: batches [B, C, H, W] of the input `images`, as the model sees them."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    prepared = out.with_name(out.name + ".prepared")
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=PRODUCTS,
        )  # fmt: skip
    finally:
        logging.root.setLevel(level)
        prepared.unlink(missing_ok=True)


def session_of(file: Path) -> Any:
    """A session of onnxruntime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def latency_ms(session: Any, image: NDArray) -> float:
    """Median time in milliseconds of a batch of one image, [1, C, H, W]."""
    found, started = list[float](), time.perf_counter()
    for _ in range(WARM_UP):
        session.run(None, {"images": image})
    while len(found) < MOST and (len(found) < FEWEST or time.perf_counter() - started < SECONDS):
        before = time.perf_counter()
        session.run(None, {"images": image})
        found.append(time.perf_counter() - before)
    return 1000 * statistics.median(found)
