"""Sections of an image classifier's report: accuracy, calibration, agreement, similarity of representations, costs."""

from collections.abc import Sequence

from convert.core.console import count, size
from convert.reports import vision_page
from convert.reports.sections import Curve, Sections
from convert.reports.vision_page import confused, estimated, points
from convert.runs.vision_schemas import VisionReport


def summary(report: VisionReport) -> str:
    """Quality and cost in a few sentences."""
    both = report.accuracy
    return (
        f"Top-1 accuracy on {report.images.held_out:,} held-out images {both.student.top1.value:.2%}; the teacher's is"
        f" {both.teacher.top1.value:.2%} (difference {points(both.difference)} points). Both predict the same class for"
        f" {report.agreement.same:.2%} of the images. The student has {report.cost.student.parameters:,} parameters,"
        f" the teacher {report.cost.teacher.parameters:,}."
    )


def comparison(report: VisionReport) -> list[tuple[str, str, str, str]]:
    """Rows of the table at the end of a run: quantity, teacher, student, comparison."""
    teacher, student = report.accuracy.teacher, report.accuracy.student
    rows = [
        (
            "top-1 accuracy, %",
            estimated(teacher.top1),
            estimated(student.top1),
            f"{points(report.accuracy.difference)} points",
        )
    ]
    if teacher.top5 is not None and student.top5 is not None:
        rows.append(("top-5 accuracy, %", estimated(teacher.top5), estimated(student.top5), ""))
    rows.append(("cross-entropy, nats", f"{teacher.cross_entropy:.4f}", f"{student.cross_entropy:.4f}", ""))
    theirs, ours = (f"{100 * model.calibration_error:.2f}" for model in (teacher, student))
    rows.append(("expected calibration error, %", theirs, ours, ""))
    rows.append(("same prediction", "", "", f"{report.agreement.same:.2%}"))
    costs = report.cost
    for name, t, s, shown in (
        ("parameters", costs.teacher.parameters, costs.student.parameters, count),
        ("multiply-accumulates of an image", costs.teacher.macs, costs.student.macs, count),
        ("weights", costs.teacher.weight_bytes, costs.student.weight_bytes, size),
        ("latency of an image, ms", costs.teacher.latency_ms, costs.student.latency_ms, lambda ms: f"{ms:.3g}"),
        (
            "images per second, 64 at once",
            costs.teacher.images_per_s,
            costs.student.images_per_s,
            lambda rate: f"{rate:,.0f}",
        ),
    ):
        rows.append((name, shown(t), shown(s), f"{s / t:.3g} x" if t else ""))
    return rows


def facts(report: VisionReport) -> list[str]:
    """Sentences on the images, and on how training and representations went."""
    images, lines = report.images, []
    if images.labelled < images.train:
        lines.append(
            f"Labels of {images.labelled:,} of {images.train:,} training images were used"
            f" ({images.labelled / images.train:.1%})."
        )
    if images.skipped:
        names = ", ".join(images.skipped_names[:3]) + (", ..." if images.skipped > 3 else "")
        lines.append(f"Files that do not decode were left out, {images.skipped:,} in all: {names}.")
    return lines + vision_page.training_lines(report) + vision_page.similarity_lines(report)


def tables(report: VisionReport) -> list[str]:
    """Markdown of accuracy and costs."""
    return [markdown([("held-out images", "teacher", "student", ""), *comparison(report)])]


def scores(report: VisionReport) -> list[str]:
    """Markdown of the classes that are taken for others; nothing where all images are right."""
    rows = confused([("", report)])
    return [f"## Classes most often taken for others\n\n{markdown(rows)}"] if len(rows) > 1 else []


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(lines) + "\n"


def usage(native: bool) -> tuple[str, str]:
    """The model card's pipeline_tag, and the code that loads the model."""
    trust = "" if native else ", trust_remote_code=True"
    return "image-classification", (
        "```python\nfrom transformers import AutoImageProcessor, AutoModelForImageClassification\n\nmodel ="
        f" AutoModelForImageClassification.from_pretrained(FOLDER{trust})\nprocessor ="
        " AutoImageProcessor.from_pretrained(FOLDER)\nlogits = model(**processor(IMAGE,"
        ' return_tensors="pt")).logits\n```\n\n'
    )


def numbers(report: VisionReport) -> dict[str, float]:
    """What W&B's table of runs shows."""
    return {
        "accuracy": report.accuracy.student.top1.value,
        "accuracy_difference": report.accuracy.difference.value,
        "agreement": report.agreement.same,
        "calibration_error": report.accuracy.student.calibration_error,
    }


VISION = Sections[VisionReport](
    summary=summary,
    lead=vision_page.lead,
    comparison=comparison,
    remarks=lambda report: [],
    facts=facts,
    tables=tables,
    scores=scores,
    texts=lambda report: [],
    usage=usage,
    cards=vision_page.cards,
    curves=(Curve("error", "Held-out error, %", log=False),),
    results=vision_page.results,
    costs=vision_page.costs,
    numbers=numbers,
)
