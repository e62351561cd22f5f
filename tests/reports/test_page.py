"""report.html: one file, nothing from outside, whatever a model writes; and a browser shows it without an error, light,
dark and narrow."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from convert.core.console import Console
from convert.core.errors import UserError
from convert.evaluate import main
from convert.reports import charts, page, report, scores
from convert.reports.language import LANGUAGE
from convert.reports.page import write_page
from convert.reports.sections import Run
from convert.runs.evaluation_schemas import Evaluation, Gap, LmEvalScore, Score
from convert.runs.language_schemas import Context, Continuation, MeasuredContext, Needle
from experiments import compare
from tests.reports.browser import BROWSER, opened


@pytest.fixture
def told(finished_run):
    """The run, whose student writes what would break a page."""
    found = Run.read(finished_run)
    nasty = Continuation(prompt="<b>", teacher="same one </pre>", student="same <script>alert(1)</script>")
    return dataclasses.replace(found, report=dataclasses.replace(found.report, continuations=[nasty]))


def shown(*runs):
    return page.page(runs, LANGUAGE)


def test_every_run_has_its_page(finished_run):
    assert (finished_run / "report.html").exists()
    text = shown(Run.read(finished_run))
    for words in (
        "neox-nano → linear",
        "Behind the teacher",
        "Loss of align",
        "Loss of distill",
        "Quality against cache",
        "Speed",
        "How it was made",
    ):
        assert words in text
    assert text.count("<svg") >= 7
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().split() and "undefined" not in text


def test_the_table_has_both_scoring_methods_and_the_gap(told):
    rows = [
        Score(
            task="facts",
            model=model,
            scoring=scoring,
            score=0.5,
            low=0.25,
            high=0.75,
            n=8,
            unparsable=0.125,
            stickiness=0.4,
            letters={"A": 0.5, "B": 0.25, "C": 0.125, "D": 0.0},
        )
        for model in ("teacher", "student")
        for scoring in ("generation", "likelihood")
    ]
    rows[2] = dataclasses.replace(rows[2], same_text=0.25, first_divergence=3.0)
    gaps = [
        Gap(task="facts", scoring=scoring, gap=0.1, low=-0.004, high=0.2, n=8)
        for scoring in ("generation", "likelihood")
    ]
    text = shown(dataclasses.replace(told, evaluation=Evaluation(rows=rows, gaps=gaps, models={})))
    cells = [
        "facts",
        "generation",
        "50.0 (25 to 75)",
        "50.0 (25 to 75)",
        "10.0 (0 to 20)",
        "8",
        "12% / 12%",
        "",
        "",
        "25%",
        "token 4",
    ]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in text
    assert "Win-and-tie rate by tolerance" in text and "of 1 tasks by generation, within 10% of the teacher" in text
    assert "Win-and-tie rate by generation 0%: on 0 of 1 tasks (0 to 1 within the gaps" in text
    letters = ["facts", "student", "generation", "50%", "25%", "12%", "0%", "12%", "0.40"]
    assert "".join(f"<td>{cell}</td>" for cell in letters) in text


@pytest.mark.filterwarnings("ignore")
def test_a_later_evaluation_is_on_the_page(finished_run, tmp_path, told):
    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    assert main([str(mine), "--tasks", "names", "--limit", "3"]) == 0
    assert "<td>names</td><td>likelihood</td>" in (text := (mine / "report.html").read_text()) and "<td>3</td>" in text
    row = LmEvalScore(
        task="arc_easy", model="student", scoring="likelihood", metric="acc", score=0.25, error=0.01, n=99
    )
    text = shown(dataclasses.replace(told, evaluation=dataclasses.replace(told.evaluation, lm_eval=[row])))
    assert "<td>arc_easy</td><td>likelihood</td><td>acc</td><td>99</td><td>student</td><td>0.2500 ± 0.0100</td>" in text


def test_what_was_found_of_long_contexts_is_shown(told):
    assert "Perplexity by the tokens" not in shown(told) and "One assignment" not in shown(told)
    models = ("teacher", "student")
    costs = [
        MeasuredContext(model=model, length=n, bytes=9, formula=9, tokens_per_s=10.0, time_to_first_token_s=0.5)
        for model in models
        for n in (1024, 77_777)
    ]
    needles = [Needle(model=model, length=512, depth=0.5, generation=0.25, likelihood=0.75) for model in models]
    seen = {model: {"0": 20.0, "64": 10.0} for model in models}
    text = shown(dataclasses.replace(told, context=Context(costs=costs, needles=needles, perplexity_by_position=seen)))
    assert "Perplexity by the tokens before" in text and "77,777" in text
    assert "<td>512</td><td>50%</td><td>25% / 75%</td><td>25% / 75%</td>" in text


def test_it_needs_nothing_from_outside(told):
    text = shown(told)
    links = set(re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text)) | set(
        re.findall(r"url\((?!#)([^)]*)\)", text)
    )
    assert not links
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(text) < 500_000


def test_what_a_model_writes_is_text(told):
    text = shown(told)
    assert "<script>" not in text and "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in text
    assert "<pre>same one &lt;/pre&gt;<mark></mark></pre>" in text


def test_colours_are_the_pages(told):
    text = shown(told)
    assert not re.search(r"#0000(0[12]|1[0-7])\b", text) and "var(--c0)" in text and "var(--ink)" in text
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_several_runs_share_a_page(finished_run, told, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(finished_run, other)
    monkeypatch.setattr(
        "sys.argv", ["compare", str(finished_run), str(other), "--out", str(tmp_path / "deep" / "page.html")]
    )
    compare.main()
    text = (tmp_path / "deep" / "page.html").read_text()
    assert "2 conversions side by side" in text and "other: distill" in text and text.count("Gap by task") == 0


def test_a_damaged_file_is_a_sentence(finished_run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    (mine / "context.json").write_text('{"costs": [')
    with pytest.raises(UserError, match=r"context\.json is damaged: it is not JSON: .* Remove it, and measure again"):
        write_page([mine], tmp_path / "page.html", LANGUAGE)


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"A finished run has a report\.json; .* has none"):
        write_page([tmp_path], tmp_path / "page.html", LANGUAGE)
    assert not (tmp_path / "page.html").exists()


NASTY = (
    """"><script>document.title="OWNED"</script><img src=x onerror='document.title="OWNED"'>`|*_[red]$\\foo$"""
    " {{7*7}} :boom: \x1b[31m\ud800\n# "
)
STRUCTURE = ("scoring", "model", "kind", "perplexity_by_position", "domain")  # words that are checked, not shown


def spoilt(found, key=""):
    """With every text that a stranger could write replaced."""
    if isinstance(found, dict):
        return {name: spoilt(value, name) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(spoilt(value, key) for value in found)
    return f"{NASTY}{found}" if isinstance(found, str) and key not in STRUCTURE else found


@pytest.fixture(scope="module")
def hostile(finished_run, tmp_path_factory):
    """A stranger's run folder, with such texts in every file and in its own name, as it is read."""
    folder = tmp_path_factory.mktemp("strangers") / NASTY.replace("/", "").replace("\ud800", "")
    folder.mkdir()
    found = json.loads((finished_run / "report.json").read_text())
    told = json.loads((finished_run / "evaluation.json").read_text())
    row = {"task": "a", "model": NASTY, "scoring": "likelihood", "metric": "m", "score": 0.25, "error": 0.01, "n": 9}
    letters = {"letters": dict.fromkeys("ABCD", 0.25), "stickiness": 0.7}
    told |= {"lm_eval": [row], "rows": [row | letters for row in told["rows"]]}
    found["export"]["native"] = {"obstacle": "none"}
    found["versions"] = {NASTY: "1"}
    found["layers"] = {"kept": [1], "kl_when_edited_alone": [0.5, 0.25]}
    needles = [
        {"model": who, "length": 512, "depth": 0.5, "generation": 0.25, "likelihood": 0.75}
        for who in ("teacher", "student")
    ]
    for name, content in (("report", found), ("evaluation", told), ("context", {"needles": needles, "version": 2})):
        (folder / f"{name}.json").write_text(json.dumps(spoilt(content)))
    rows = [spoilt(json.loads(line)) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run.read(folder)


def test_no_text_of_a_stranger_becomes_markup_of_the_page(hostile):
    text = shown(hostile) + shown(hostile, dataclasses.replace(hostile, name="other" + NASTY))
    assert text.count("OWNED") > 100
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.extend([tag, *(name for name, _ in attributes)])
    parser.feed(text)
    assert {"svg", "table"} < set(found) and not [
        name for name in found if name in ("script", "img") or name.startswith("on")
    ]
    assert "{{7*7}}" in text
    labels = re.findall(r'aria-label="([^"]*)"', text)
    assert labels and all("<" not in label for label in labels)
    ids = re.findall(r'\sid="([^"]*)"', text.split("</html>")[0])
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w.-]+", one) for one in ids)


def test_no_text_of_a_stranger_becomes_markup_of_the_report(hostile):
    """As a reader of Markdown that lets HTML through shows it."""
    written = report.markdown(dataclasses.replace(hostile.report, evaluation=hostile.evaluation), LANGUAGE)
    rendered = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(written)
    assert rendered.count("OWNED") > 20 and not re.search(r"<(script|img|a |em>|s>)", rendered)
    assert len(re.findall("<h1>", rendered)) == 1 and rendered.count("<table>") == 3
    for row in re.findall(r"<tr>(.*?)</tr>", rendered, re.DOTALL):
        assert len(re.findall("<t[hd]", row)) in (6, 9)
    assert "\x1b" not in written


def test_no_text_of_a_stranger_moves_the_cursor(hostile):
    console = Console(file=io.StringIO(), width=5000, force_terminal=True, color_system=None)
    report.show(hostile.report, console, LANGUAGE)
    scores.show(hostile.evaluation, console)
    printed = console.file.getvalue()
    assert "[red]" in printed and ":boom:" in printed and "\x1b[31m" not in printed and "\\x1b[31m" in printed


@pytest.mark.parametrize("name", ["a$\\foo$", "_hidden", "$x", "__", "文字", "x" * 3000, "a\nb", "\ud800", ""])
def test_every_run_is_in_the_legend(name):
    svg = charts.curves("loss", [(name, [1, 2], [1.0, 0.5]), ("other", [1, 2], [1.0, 0.5])], "loss", log=True)
    wanted = name.replace("\n", "\\n").replace("\ud800", "\\ud800")[:39]
    assert wanted in svg and "other" in svg and "mathdefault" not in svg


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(
    "run, width, scheme",
    [("told", 1100, "light"), ("told", 500, "dark"), ("hostile", 1100, "light"), ("hostile", 500, "dark")],
)
def test_a_browser_shows_it(request, run, tmp_path, width, scheme):
    title, document, logged = opened(shown(request.getfixturevalue(run)), tmp_path, width, scheme)
    assert "CONSOLE" not in logged
    assert not title.startswith(("ERROR", "OWNED")) and "<img" not in document
    wide, window = map(int, re.search(r"WIDTH (\d+) OF (\d+)", title).groups())
    assert wide <= window, "nothing sticks out"
