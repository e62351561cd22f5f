"""What is printed is text, on any stream."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from convert.core import console
from convert.core.console import Console, short, visible

ROOT = Path(console.__file__).parents[2]


def test_names_are_shown_as_they_are():
    shown = Console(file=io.StringIO(), width=200)
    shown.print("[red]a[/] :boom: \\ \x1b[31m\x07\u202e \ud800", style="bold")
    assert shown.file.getvalue() == "[red]a[/] :boom: \\ \\x1b[31m\\x07\\u202e \\ud800\n"
    assert (
        visible("été 文字 👍 a b") == "été 文字 👍 a b"
        and visible("a\nb") == "a\\nb"
        and short("x" * 300, 10) == "x" * 9 + "…"
    )


def test_nothing_is_printed_as_markup():
    """Styles are arguments: a name in such a text would be read as markup, too."""
    files = [file for folder in ("convert", "experiments") for file in (ROOT / folder).rglob("*.py")]
    assert not [file for file in files if "[/" + "]" in file.read_text() or "[/" + "dim]" in file.read_text()]


SHELL = {"closed": "1>&- 2>&-", "closed input too": "0<&- 1>&- 2>&-", "output alone": "1>&-"}


@pytest.mark.parametrize("streams", SHELL.values(), ids=SHELL)
def test_streams_that_are_closed_lead_nowhere(streams, tmp_path):
    """And no file that is opened later takes their number: a library that prints would write into it."""
    script = (
        "import sys\nfrom convert.core.console import console\nconsole.print('shown')\nprint('said',"
        f" file=sys.stderr)\nf = open({str(tmp_path / 'mine')!r}, 'w')\nassert f.fileno() > 2\nimport os; os.write(1,"
        " b'from C')\nf.write('mine'); f.close()\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        f"{sys.executable} {tmp_path / 'script.py'} {streams}",
        shell=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0 and (tmp_path / "mine").read_text() == "mine"


def test_a_terminal_that_lacks_a_character_shows_its_number():
    script = r"from convert.core.console import console; console.print('\xe9 \u6587 \u2192'); print('\xe9')"
    environment = {
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HOME": "/nonexistent",
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and r"\xe9" in done.stdout, done.stderr
