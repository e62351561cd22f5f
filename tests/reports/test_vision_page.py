"""The report of an image classifier: the page, report.md and the tables at the end of a run, from a run's folder."""

import dataclasses
import io
import json
import re

import pytest
from markdown_it import MarkdownIt

from convert import evaluate
from convert.core.console import Console
from convert.core.errors import UserError
from convert.evaluation.vision_metrics import final_metrics, keep_start
from convert.reports import charts, page, report
from convert.reports.sections import Run
from convert.reports.vision import VISION
from convert.reports.vision_page import training_lines
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.schemas import Handover, Layers, Seconds, StepResult, TokenCount
from convert.runs.vision_schemas import ErrorInTraining, ImageRunSettings, VisionReport
from experiments import compare
from tests.evaluation.classifiers import classifier, image_batches, image_data
from tests.reports.browser import BROWSER, opened
from tests.reports.test_page import NASTY

STAGE = StepResult(
    name="distill", kind="TrainImages", tokens=64, seconds=1.0, loss_first=2.0, loss_last=1.0, headline_after=90.0,
    skipped=0,
)  # fmt: skip
SETTINGS = ImageRunSettings(
    teacher="vit-nano", teacher_fingerprint="0", target="resnet-nano", data="digits", data_fingerprint="1",
    steps=[
        {"kind": "Build", "name": "build", "model": "resnet-nano", "options": {}},
        {"kind": "TrainImages", "name": "distill", "settings": {"images": 64, "batch_images": 16, "lr": 0.1}},
    ],
)  # fmt: skip


def make_run(folder, metrics) -> Run:
    found = VisionReport(
        domain="vision", unit="images", teacher="vit-nano", target="resnet-nano",
        evaluation=Evaluation(rows=[], gaps=[], models={}), seed=0, device="cpu", commit=None,
        versions={"torch": "2"}, settings=SETTINGS, steps=[STAGE], stages=[STAGE], handover=Handover(),
        layers=Layers(), seconds=Seconds(total=1.0), tokens=TokenCount(total=64), **vars(metrics),
    )  # fmt: skip
    (folder / "report.json").write_text(json.dumps(dataclasses.asdict(found)))
    return Run.read(folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A finished run of tiny classifiers, read from its folder, and that folder."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    folder.mkdir()
    teacher, student, batches = classifier("vit"), classifier("resnet"), image_batches(40, 30)
    rows = [
        {"stage": "distill", "step": n, "tokens": 16 * n, "train/loss": 2.0 - n / 4, "held_out/error": 95.0 - n}
        for n in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep_start(classifier("resnet", seed=5), teacher, batches, folder)
    return make_run(folder, final_metrics(student, teacher, image_data(), batches, folder)), folder


@pytest.fixture(scope="module")
def run(told):
    return told[0]


def shown(*runs):
    return page.page(runs, VISION)


@pytest.fixture(scope="module")
def html(run):
    return shown(run)


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_a_run_is_read_as_it_was_written(run):
    assert isinstance(run.report, VisionReport)
    assert run.report.settings.steps[1]["settings"]["lr"] == 0.1
    assert [row.error for row in run.metrics] == [94.0, 93.0, 92.0, 91.0]


def test_the_page_has_every_number_as_text(run, html):
    text, words = html, text_of(html)
    r = run.report
    for part in (
        "vit-nano → resnet-nano", "Accuracy on held-out images", "Confusion of the teacher", "CKA before training",
        "CKA after", "What a pass costs", "Held-out error", "Loss of distill", "class 11", f"{r.cost.student.macs:,}",
        f"{r.headline.student:.2f} %", "the error was lowest at the last measurement: 91.00 % after 64 images.",
    ):  # fmt: skip
        assert part in words, part
    assert text.count("<svg") == 6  # a loss, an error, two confusions, two similarities
    for found in (r.similarity.before, r.similarity.after):
        for number, row in enumerate(found.values):
            assert "".join(f"<td>{cell}</td>" for cell in [number, *(f"{value:.2f}" for value in row)]) in text
    assert "tokens" not in words and "nan" not in words.lower().split()


def test_confusion_is_told_in_numbers(run, html):
    matrix = [run.report.predictions.confusion(model, 12) for model in ("teacher", "student")]
    cells = [f"{t} / {s}" if t or s else "" for t, s in zip(matrix[0][3], matrix[1][3], strict=True)]
    assert "".join(f"<td>{cell}</td>" for cell in ["class 3", *cells]) in html
    label, predicted = max(
        ((i, j) for i in range(12) for j in range(12) if i != j), key=lambda pair: matrix[1][pair[0]][pair[1]]
    )
    most, total = matrix[1][label][predicted], sum(matrix[1][label])
    row = [f"class {label}", f"class {predicted}", str(most), str(matrix[0][label][predicted]), str(total)]
    assert "".join(f"<td>{cell}</td>" for cell in row) in html


def many_classes(run):
    """The same run with so many classes that matrices are not shown whole."""
    images = dataclasses.replace(run.report.images, class_names=[f"class {n}" for n in range(1000)])
    return dataclasses.replace(run, report=dataclasses.replace(run.report, images=images))


def test_many_classes_have_a_table_of_mistakes_alone(run):
    text = shown(many_classes(run))
    assert "Confusion of the" not in text and "Most frequent mistakes" in text and len(text) < 200_000


def test_several_runs_share_a_page(run):
    text = text_of(shown(run, dataclasses.replace(run, name="other")))
    assert "2 conversions side by side" in text and "other: CKA after" in text and "other: Confusion" in text
    assert "digits student" in text and "other student" in text


def test_runs_of_two_kinds_share_no_page(told, finished_run, tmp_path, monkeypatch):
    _, folder = told
    page = tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["compare", str(folder), str(folder), "--out", str(page)])
    compare.main()
    assert "2 conversions side by side" in page.read_text()
    monkeypatch.setattr("sys.argv", ["compare", str(folder), str(finished_run), "--out", str(tmp_path / "other.html")])
    with pytest.raises(UserError, match="these are of vision and of language"):
        compare.main()


def test_images_are_asked_no_tasks(told, capsys):
    _, folder = told
    assert evaluate.main([str(folder)]) == 2
    assert "Tasks are asked of language models" in capsys.readouterr().err
    assert not (folder / "evaluation.json").exists()


def test_the_end_of_a_run_and_the_card(run):
    console = Console(file=io.StringIO(), width=200)
    report.show(run.report, console, VISION)
    printed, r = console.file.getvalue(), run.report
    for part in (
        "top-1 accuracy",
        "top-5 accuracy",
        "expected calibration error",
        "images per second",
        "error after, %",
    ):
        assert part in printed
    card = report.card(r, VISION, native=True)
    assert "pipeline_tag: image-classification" in card and "trust_remote_code" not in card
    assert "trust_remote_code=True" in report.card(r, VISION)
    assert "Labels of 100 of 200 training images were used (50.0%)." in card and "a/broken.png" in card


def test_the_best_error_is_not_the_students(run):
    found = ErrorInTraining(best=5.0, best_after=1600, last=7.5, last_after=3200)
    (line,) = training_lines(dataclasses.replace(run.report, in_training=found))
    assert "lowest with 5.00 % after 1,600 images, and 7.50 % at the last measurement after 3,200." in line


def hostile(run):
    images = dataclasses.replace(
        run.report.images, class_names=[f"{NASTY}{n}" for n in range(12)], skipped_names=[NASTY]
    )
    return dataclasses.replace(run, name=NASTY, report=dataclasses.replace(run.report, images=images))


@pytest.fixture(scope="module")
def strange(run):
    return shown(hostile(run))


def test_names_of_classes_never_become_markup(run, strange):
    assert strange.count("OWNED") > 50 and not re.search(r"<(script|img)", strange)
    written = report.markdown(hostile(run).report, VISION)
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(written)
    assert "OWNED" in rendered and not re.search(r"<(script|img|a |em>|s>)", rendered)
    assert rendered.count("<table>") == 3


def test_cells_of_a_heat_map_have_the_pages_colours():
    svg = charts.heat_map("map", [[1.0, 0.0], [-0.1, 2.0]], [["a", "b"], ["c", "d"]], "xy", "zw", "rows", "columns")
    assert svg.count("var(--c0); opacity: 0.55") == 2 and "#0000" not in svg
    assert all(f">{letter}</text>" in svg for letter in "abcdxyzw")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("page_of, width, scheme", [("html", 1100, "light"), ("strange", 500, "dark")])
def test_a_browser_shows_it(request, tmp_path, page_of, width, scheme):
    title, _, logged = opened(request.getfixturevalue(page_of), tmp_path, width, scheme)
    assert "CONSOLE" not in logged and not title.startswith(("ERROR", "OWNED"))
    wide, window = map(int, re.search(r"WIDTH (\d+) OF (\d+)", title).groups())
    assert wide <= window, "nothing sticks out"
