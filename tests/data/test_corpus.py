"""Where text comes from: files, JSON lines, hub data sets, and what is refused."""

import os
import socket
import sys
from types import SimpleNamespace

import pytest

from convert.core.errors import UserError
from convert.data import hub
from convert.data.corpus import corpus, is_held_out
from convert.data.text import tokenize


def test_is_held_out_is_fixed():
    """For ever: or what was held out of one run is trained on by the next."""
    assert [i for i in range(100) if is_held_out(f"{i}.txt")] == [1, 18, 20, 39, 65, 71, 77, 85, 89, 97]
    assert sum(is_held_out(f"{i}") for i in range(8000)) / 8000 == pytest.approx(1 / 16, rel=0.15)


def test_a_single_file_is_a_corpus(tmp_path):
    (tmp_path / "one.md").write_text("text")
    assert list(corpus(str(tmp_path / "one.md")).documents()) == [("one.md", "text")]


def test_json_lines(tmp_path):
    """Strings, or objects with a text; blank lines are none; a key names its line."""
    (tmp_path / "rows.jsonl").write_text('{"text": "first", "id": 7}\n\n"second"\n')
    assert list(corpus(str(tmp_path)).documents()) == [("rows.jsonl:1", "first"), ("rows.jsonl:3", "second")]


@pytest.mark.parametrize("character", ["\u2028", "\x85"], ids=["line-separator", "next-line"])
def test_json_lines_end_at_newlines_only(tmp_path, character):
    """JSON allows other line breaks of Unicode inside a string, and web text has them."""
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "one{character}two"}}\n', encoding="utf-8")
    assert [text for _, text in corpus(str(tmp_path)).documents()] == [f"one{character}two"]


@pytest.mark.parametrize(
    "name, text", [("a.txt", "one\r\n\r\ntwo"), ("a.jsonl", '{"text": "one"}\r\n"two"'), ("a.py", "x = 1\n")]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, text):
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(mark + text.encode())
        found.append(list(corpus(str(tmp_path / name)).documents()))
    assert found[0] == found[1] and found[0]


def test_numbers_beside_the_text_may_be_long(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": ' + "9" * 6000 + ', "text": "one", "big": 1e999}\n')
    assert [text for _, text in corpus(str(tmp_path)).documents()] == ["one"]


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    """A pipe would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.txt")
        for name in ("pipe.txt", "device.txt", "socket.txt"):
            with pytest.raises(UserError, match=f"Data is read from files and folders; '{name}' is neither"):
                corpus(name)
        (tmp_path / "folder.txt").mkdir()
        (tmp_path / "real.txt").write_text("text")
        assert [key for key, _ in corpus(str(tmp_path)).documents()] == ["real.txt"]
    for wrong in ("a\0b", ""):
        with pytest.raises(UserError, match="^--data must be a path"):
            corpus(wrong)


WRONG = {
    "missing": (
        None,
        "",
        r"There is no data at .*nowhere.*Give 'stdlib', a file or folder of .txt, .md, .py, .jsonl, hub:NAME or stream",
    ),
    "empty-folder": (".", None, r"The folder .* has no .txt, .md, .py, .jsonl files"),
    "other-suffix": ("table.csv", b"a,b", r"Data files end in .txt, .md, .py, .jsonl; got 'table.csv'"),
    "not-utf-8": (
        "latin.txt",
        b"caf\xe9 au lait",
        r"must be UTF-8 text; .*latin.txt is not \(byte 3\). Convert or remove it",
    ),
    "binary": (
        "image.txt",
        b"PNG\x00\x01",
        r"must be text; .*image.txt holds NUL bytes, so it looks binary. Remove it",
    ),
    "bad-json": ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', r"Line 2 of .*rows.jsonl is not JSON: "),
    "half-a-character": (
        "rows.jsonl",
        b'"fine"\n{"text": "a \\ud83d b"}\n',
        r"Line 2 of .*rows.jsonl holds half of a surrogate pair",
    ),
    "too-deep": (
        "rows.jsonl",
        b'"fine"\n' + b'{"text":' * 50_000,
        r"Line 2 of .*rows.jsonl is not JSON: it is nested too deeply",
    ),
    "nothing-but-digits": ("rows.jsonl", b"9" * 6000, r"Line 1 of .*rows.jsonl must be a string or an object"),
    "json-number": ("rows.jsonl", b"3\n", r'Line 1 of .*rows.jsonl must be a string or an object with a "text" field'),
    "json-other-field": (
        "rows.jsonl",
        b'{"content": "x"}',
        r'Line 1 of .*rows.jsonl must be a string or an object with a "text" field',
    ),
    "blank": ("blank.txt", b" \n\n", r"The data .* holds no text"),
}


@pytest.mark.parametrize("name, content, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_refused_in_a_sentence(name, content, message, tmp_path, tokenizer, cache):
    place = tmp_path / ("nowhere" if name is None else name)
    if content:
        place.write_bytes(content)
    elif name is not None:
        place = tmp_path / "empty"
        place.mkdir()
    with pytest.raises(UserError, match=message) as caught:
        tokenize(corpus(str(place)), tokenizer)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_hub_data_without_a_name_or_without_datasets(monkeypatch):
    with pytest.raises(UserError, match="written hub:NAME or hub:NAME:CONFIG; got 'hub:'"):
        corpus("hub:")
    source = corpus("hub:some/set:config")
    assert source.hub == ("some/set", "config")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="need the `datasets` package"):
        list(source.documents())


@pytest.mark.parametrize("reachable", [True, False])
def test_hub_data_without_the_hub_comes_from_the_cache_or_is_refused_at_once(reachable, monkeypatch):
    """Offline, `datasets` tries nothing, so it says nothing; afterwards it is as it was."""

    def load_dataset(name, *_, **__):
        assert settings.HF_HUB_OFFLINE is not reachable
        if name == "not/there":
            raise ConnectionError("OfflineModeIsEnabled")
        return [{"text": "one"}]

    settings, exceptions = SimpleNamespace(HF_HUB_OFFLINE=False), SimpleNamespace(DatasetsError=KeyError)
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(config=settings, exceptions=exceptions, load_dataset=load_dataset)
    )
    monkeypatch.setattr(hub, "is_hub_reachable", lambda: reachable)
    assert list(corpus("hub:some/set").documents()) == [("0", "one")]
    reason = "OfflineModeIsEnabled" if reachable else "the local cache lacks it and the hub gives no answer"
    with pytest.raises(
        UserError,
        match=rf"^The data set 'not/there' could not be read \({reason}\)\. Without network use --data stdlib",
    ):
        list(corpus("hub:not/there").documents())
    assert settings.HF_HUB_OFFLINE is False


def test_rows_of_the_hub_without_text_are_left_out_and_counted(monkeypatch, capsys):
    """A stream is long: what was read before such a row is not lost."""
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"text": None}, {"text": "two"}]
    exceptions, settings = SimpleNamespace(DatasetsError=KeyError), SimpleNamespace(HF_HUB_OFFLINE=True)
    sets = {"some/set": rows, "other/set": [{"text": "one"}, {"text": [1]}]}
    fake = SimpleNamespace(config=settings, exceptions=exceptions, load_dataset=lambda name, *_, **__: sets[name])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(corpus("hub:some/set").documents()) == [("0", "one"), ("2", ""), ("4", "two")]
    assert "2 rows of some/set have no text (null); they were left out." in capsys.readouterr().out
    with pytest.raises(UserError, match="The 'text' of data set other/set must be strings; row 1 has a list"):
        list(corpus("hub:other/set").documents())


def test_stdlib_is_source_without_tests():
    source = corpus("stdlib")
    keys = [file.relative_to(source.root).as_posix() for file in source.files]
    assert {"argparse.py", "json/decoder.py"} <= set(keys) and len(keys) == len(set(keys)) > 300
    assert not [key for key in keys if {"test", "tests", "__pycache__", "site-packages"} & set(key.split("/"))]
