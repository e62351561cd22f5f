"""Files are written whole or not at all and in UTF-8 whatever the locale is; JSON of a stranger is a value or a
sentence."""

import ast
from pathlib import Path

import pytest

from convert.core.errors import UserError
from convert.core.files import parse_json, sha256, write_text

ROOT = Path(__file__).resolve().parents[2]
TEXT_CALLS = ("read_text", "write_text", "open")


def without_encoding(source: str) -> list[int]:
    """The lines of calls that open a file as text in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (
            not isinstance(node, ast.Call)
            or (name := getattr(node.func, "attr", getattr(node.func, "id", None))) not in TEXT_CALLS
        ):
            continue
        if isinstance(node.func, ast.Name) and name != "open":  # our own write_text
            continue
        if getattr(getattr(node.func, "value", None), "id", None) == "Image":  # Pillow's
            continue
        modes = [
            a.value
            for a in node.args
            if isinstance(a, ast.Constant) and isinstance(a.value, str) and set(a.value) <= set("rwab+x")
        ]
        if getattr(node.func, "value", None) is not None and ast.unparse(node.func.value) in ("os", "webbrowser"):
            continue
        if not any("b" in mode for mode in modes) and "encoding" not in {keyword.arg for keyword in node.keywords}:
            found.append(node.lineno)
    return found


def test_every_text_file_has_an_encoding():
    assert without_encoding(
        "p.open('w')\nopen(p)\np.read_text()\np.open('rb')\np.write_text(t, encoding='utf-8')\nos.open(p, 0)"
    ) == [
        1,
        2,
        3,
    ]
    files = [file for folder in ("convert", "kernels", "experiments") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 60
    assert {
        str(file.relative_to(ROOT)): lines
        for file in files
        if (lines := without_encoding(file.read_text(encoding="utf-8")))
    } == {}


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    write_text(file, "été 文字 \ud800 \n")
    assert file.read_bytes() == "été 文字 \\ud800 \n".encode()
    before = sha256(file)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")
    assert sha256(file) == before and list(tmp_path.iterdir()) == [file]
    assert sha256(file, 3) == sha256(file, 3) != before


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 50_000, "9" * 6000, "\ufeff{}", b"\xff", b"\0\0", "{'a': 1}"]
)
def test_what_is_no_json_is_a_sentence_that_says_where(text):
    with pytest.raises(UserError, match=r"^Line 3 of mine is not JSON: [^\n]+\.$"):
        parse_json(text, "Line 3 of mine")
