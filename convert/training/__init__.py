"""Training: stages over one loop. A stage is `stage(student, teacher, batches, settings, *, track, keep, measure)`,
which returns the student; `batches(step)` is the batch of a step."""

from collections.abc import Callable

from convert.training import align, distill, supervised

STAGES: dict[str, Callable] = {
    "align": align.align,
    "distill": distill.distill,
    "supervised": supervised.supervised,
}
