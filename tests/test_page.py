"""report.html: one file, nothing from outside, whatever a model writes; and a browser shows it without an error, light, dark and narrow."""

import dataclasses
import re
import shutil
import subprocess

import pytest

from convert import page, recipes, run
from convert.errors import UserError
from convert.page import Run, write_page
from experiments import compare

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nano-linear"
    budget = recipes.Budget(2048, 64, 256, 1e-2, 1e-3, recipes.Distill(), 256, questions=2)
    run("neox-nano", recipes.to_linear(budget), out, wandb="disabled")
    return out


@pytest.fixture
def told(folder):
    """The run, whose student writes what would break a page."""
    found = Run.read(folder)
    nasty = found.report | {"continuations": [{"prompt": "<b>", "teacher": "same </pre> one", "student": "same <script>alert(1)</script>"}]}
    return dataclasses.replace(found, report=nasty)


def test_every_run_has_its_page(folder):
    text = (folder / "report.html").read_text()
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


def test_it_needs_nothing_from_outside(told):
    text = page.page([told])
    links = set(re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text)) | set(re.findall(r"url\((?!#)([^)]*)\)", text))
    assert not links
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(text) < 500_000


def test_what_a_model_writes_is_text(told):
    text = page.page([told])
    assert "<script>" not in text and "<mark>&lt;script&gt;alert(1)&lt;/script&gt;</mark>" in text
    assert "<pre>same &lt;/pre&gt; one<mark></mark></pre>" in text


def test_colours_are_the_pages(told):
    text = page.page([told])
    assert not re.search(r"#0000(0[12]|1[0-7])\b", text) and "var(--c0)" in text and "var(--ink)" in text
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_several_runs_share_a_page(folder, told, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    monkeypatch.setattr("sys.argv", ["compare", str(folder), str(other), "--out", str(tmp_path / "deep" / "page.html")])
    compare.main()
    text = (tmp_path / "deep" / "page.html").read_text()
    assert "2 conversions side by side" in text and "other: distill" in text and text.count("Gap by task") == 0


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"A finished run has a report\.json; .* has none"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


PROBE = """<script>
window.onerror = (message) => { document.title = "ERROR " + message; };
window.onload = () => { document.title += " WIDTH " + document.documentElement.scrollWidth + " OF " + window.innerWidth; };
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1100, 500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(told, tmp_path, width, scheme):
    (tmp_path / "page.html").write_text(page.page([told]).replace("</head>", PROBE + "</head>"))
    more = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom", *more,
         f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    title = re.search(r"<title>(.*?)</title>", shown.stdout)[1]
    wide, window = map(int, re.search(r"WIDTH (\d+) OF (\d+)", title).groups())
    assert wide <= window, "nothing sticks out"
