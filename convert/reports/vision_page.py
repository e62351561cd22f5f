"""Sections of the page of image classifiers: accuracy, confusion, similarity of representations and costs, of one run
or of several."""

from collections.abc import Iterator, Sequence
from typing import Any

from convert.core.console import duration, size
from convert.reports import charts
from convert.reports.sections import Card, Chart, PageSection, Run, Table
from convert.runs.keys import MODELS, ModelName
from convert.runs.vision_schemas import Accuracy, Estimate, LayerSimilarity, VisionReport

VisionRun = Run[VisionReport]
Named = Sequence[tuple[str, VisionReport]]  # (name of the run, empty where it is the only one; its report)
MOST_CLASSES = 20  # of a confusion matrix that is shown whole
MOST_CONFUSED = 10  # rows of the table
MOST_NUMBERS = 14  # columns of a heat map of similarities whose cells have numbers


def estimated(found: Estimate) -> str:
    """A share and its interval, in percent."""
    return f"{100 * found.value:.2f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def points(found: Estimate) -> str:
    """A difference of shares and its interval, in points."""
    return f"{100 * found.value:+.2f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def lead(run: VisionRun) -> str:
    """Quality and cost in one sentence."""
    report, both = run.report, run.report.accuracy
    return (
        f"top-1 error on {report.images.held_out:,} held-out images {report.headline.student:.2f} %, the teacher's is"
        f" {report.headline.teacher:.2f} % (accuracy {points(both.difference)} points); same prediction for"
        f" {report.agreement.same:.1%}; {report.cost.student.parameters:,} parameters,"
        f" {report.cost.student.parameters / report.cost.teacher.parameters:.3g} times the teacher's."
    )


def cards(run: VisionRun) -> list[Card]:
    """The numbers in large type."""
    report, student = run.report, run.report.accuracy.student
    return [
        Card("Top-1 error", f"{report.headline.student:.2f} %", f"teacher {report.headline.teacher:.2f} %"),
        Card("Accuracy", f"{100 * report.accuracy.difference.value:+.2f}", "points beside the teacher"),
        Card("Same prediction", f"{report.agreement.same:.1%}", f"of {report.images.held_out:,} images"),
        Card(
            "Calibration error",
            f"{100 * student.calibration_error:.2f} %",
            f"teacher {100 * report.accuracy.teacher.calibration_error:.2f} %",
        ),
        Card("Training", duration(report.seconds.total), f"{report.tokens.total:,} images"),
    ]


def results(runs: Sequence[VisionRun]) -> list[PageSection]:
    """How good the students are, where they err, and what they share with their teachers."""
    named = _named(runs)
    return [
        PageSection(
            "Accuracy on held-out images",
            "With 95 % bootstrap intervals over the images; the difference to the teacher is paired by image. Expected"
            " calibration error: 15 bins of equal width.",
            lines=[_of_run(name, line) for name, report in named for line in training_lines(report)],
            tables=[Table(_accuracy_rows(named)), Table(_agreement_rows(named), "Right predictions, in images")],
        ),
        PageSection(
            "Which classes are taken for others",
            charts=[chart for name, report in named for chart in _confusion_charts(name, report)],
            tables=[Table(confused(named), "Most frequent mistakes"), *_confusion_tables(named)],
        ),
        PageSection(
            "Similarity of representations",
            "Linear CKA between the hidden states of teacher and student on held-out images: 1 where they are equal up"
            " to rotation and scale, 0 where they are unrelated. 0 is the embedding.",
            lines=[_of_run(name, line) for name, report in named for line in similarity_lines(report)],
            charts=[_similarity_chart(title, found) for title, found in _similarities(named)],
            tables=[Table(_similarity_rows(found), title) for title, found in _similarities(named)],
        ),
    ]


def costs(runs: Sequence[VisionRun]) -> list[PageSection]:
    """What a pass costs."""
    threads = sorted({run.report.cost.threads for run in runs})
    note = (
        "Latency is the median pass of one image, throughput that of 64 images at once, on the device of the run with"
        f" {' or '.join(map(str, threads))} CPU threads; both leave out decoding and preparing images."
    )
    return [PageSection("What a pass costs", note, tables=[Table(_cost_rows(_named(runs)))])]


def training_lines(report: VisionReport) -> list[str]:
    """The best and the last error in training, in a sentence."""
    found = report.in_training
    if found is None:
        return []
    where, at = (
        "Measured on the held-out images while it trained, the error was lowest",
        f"after {found.best_after:,} images",
    )
    if found.best_after == found.last_after:
        return [f"{where} at the last measurement: {found.best:.2f} % {at}."]
    return [
        f"{where} with {found.best:.2f} % {at}, and {found.last:.2f} % at the last measurement after"
        f" {found.last_after:,}. The student is the last one, not the best one."
    ]


def similarity_lines(report: VisionReport) -> list[str]:
    """The similarity of the last hidden states, in a sentence."""
    after, before = report.similarity.after, report.similarity.before
    if not after.values:
        return []
    then = f", and {before.values[-1][-1]:.2f} before training" if before is not None and before.values else ""
    return [
        f"CKA of the last hidden states of teacher and student is {after.values[-1][-1]:.2f}{then}"
        f" ({after.images:,} images)."
    ]


def _named(runs: Sequence[VisionRun]) -> Named:
    return [(run.name if len(runs) > 1 else "", run.report) for run in runs]


def _of_run(name: str, text: str) -> str:
    return f"{name}: {text}" if name else text


def _of(both: Any, model: ModelName) -> Any:
    """The teacher's or the student's field of a record that has both."""
    return both.teacher if model == "teacher" else both.student


def _rows(head: list[str], named: Named, rows: list[tuple[str, list[str]]]) -> list[list[str]]:
    """A head and rows of (name of the run, cells); the column of names is left out where there is one run."""
    several = len(named) > 1
    return [["run", *head] if several else head, *([name, *cells] if several else cells for name, cells in rows)]


def _accuracy_rows(named: Named) -> list[list[str]]:
    has_top5 = any(report.accuracy.student.top5 is not None for _, report in named)
    head = ["model", "top-1, %", *(["top-5, %"] if has_top5 else [])]
    head += ["cross-entropy, nats", "calibration error, %", "top-1 beside the teacher"]
    rows = []
    for name, report in named:
        for model in MODELS:
            found: Accuracy = _of(report.accuracy, model)
            cells = [model, estimated(found.top1)]
            if has_top5:
                cells.append("" if found.top5 is None else estimated(found.top5))
            cells += [f"{found.cross_entropy:.4f}", f"{100 * found.calibration_error:.2f}"]
            rows.append((name, [*cells, points(report.accuracy.difference) if model == "student" else ""]))
    return _rows(head, named, rows)


def _agreement_rows(named: Named) -> list[list[str]]:
    head = ["teacher", "student right", "student wrong"]
    rows = []
    for name, report in named:
        found = report.agreement
        rows.append((name, ["right", f"{found.both_right:,}", f"{found.only_teacher:,}"]))
        rows.append((name, ["wrong", f"{found.only_student:,}", f"{found.both_wrong:,}"]))
    return _rows(head, named, rows)


def confused(named: Named) -> list[list[str]]:
    """The most frequent mistakes of each student, with how often its teacher makes them."""
    rows = []
    for name, report in named:
        classes = report.images.class_names
        teacher, student = (report.predictions.counts(model) for model in MODELS)
        totals = report.predictions.totals()
        wrong = sorted((pair for pair in student if pair[0] != pair[1]), key=lambda pair: (-student[pair], pair))
        for label, predicted in wrong[:MOST_CONFUSED]:
            pair = label, predicted
            cells = [classes[label], classes[predicted], f"{student[pair]:,}", f"{teacher.get(pair, 0):,}"]
            rows.append((name, [*cells, f"{totals[label]:,}"]))
    return _rows(["class", "taken for", "by the student", "by the teacher", "images of the class"], named, rows)


def _shown_whole(report: VisionReport) -> bool:
    return len(report.images.class_names) <= MOST_CLASSES


def _confusion_charts(name: str, report: VisionReport) -> Iterator[Chart]:
    """Heat maps of the confusion matrices, as shares of each class."""
    if not _shown_whole(report):
        return
    classes = report.images.class_names
    for model in MODELS:
        matrix = report.predictions.confusion(model, len(classes))
        shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
        cells = [[f"{cell}" if cell else "" for cell in row] for row in matrix]
        title = _of_run(name, f"Confusion of the {model}")
        svg = charts.heat_map(title, shares, cells, classes, classes, "right class", "predicted")
        yield Chart(title, svg)


def _confusion_tables(named: Named) -> Iterator[Table]:
    """The confusion matrices in numbers."""
    for name, report in named:
        if not _shown_whole(report):
            continue
        classes = report.images.class_names
        matrices = [report.predictions.confusion(model, len(classes)) for model in MODELS]
        rows = [["class", *classes]]
        for number, label in enumerate(classes):
            pairs = zip(*(matrix[number] for matrix in matrices), strict=True)
            rows.append([label, *(" / ".join(f"{cell}" for cell in pair) if any(pair) else "" for pair in pairs)])
        title = _of_run(name, "Confusion of the teacher / the student, in images")
        yield Table(rows, title, "A row for each right class, a column for each that was predicted.")


def _similarities(named: Named) -> Iterator[tuple[str, LayerSimilarity]]:
    for name, report in named:
        for when, found in (("before training", report.similarity.before), ("after", report.similarity.after)):
            if found is not None and found.values:
                yield _of_run(name, f"CKA {when}"), found


def _similarity_chart(title: str, found: LayerSimilarity) -> Chart:
    columns = len(found.values[0])
    cells = [[f"{value:.2f}" if columns <= MOST_NUMBERS else "" for value in row] for row in found.values]
    labels = [str(number) for number in range(len(found.values))], [str(number) for number in range(columns)]
    svg = charts.heat_map(title, found.values, cells, *labels, "teacher's layer", "student's layer")
    return Chart(title, svg)


def _similarity_rows(found: LayerSimilarity) -> list[list[str]]:
    head = ["teacher's layer", *(f"student's {number}" for number in range(len(found.values[0])))]
    return [head, *([str(number), *(f"{value:.2f}" for value in row)] for number, row in enumerate(found.values))]


def _cost_rows(named: Named) -> list[list[str]]:
    """What a pass of each model costs."""
    head = ["model", "parameters", "multiply-accumulates", "weights", "latency, ms", "images per second"]
    rows = []
    for name, report in named:
        for model in MODELS:
            found = _of(report.cost, model)
            cells = [model, f"{found.parameters:,}", f"{found.macs:,}", size(found.weight_bytes)]
            rows.append((name, [*cells, f"{found.latency_ms:.3g}", f"{found.images_per_s:,.0f}"]))
    return _rows(head, named, rows)
