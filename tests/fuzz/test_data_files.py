"""Training text of a stranger: files and folders of every kind."""

import json
import os

import pytest
from hypothesis import strategies as st

from convert.core.errors import UserError
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.models.catalog import NANO
from convert.models.loading import load_teacher
from tests.fuzz import contents, fuzz

LINES = st.one_of(
    st.text(max_size=50).map(lambda text: json.dumps({"text": text})),
    st.sampled_from(
        [
            "",
            " ",
            "{}",
            "[]",
            "null",
            "5",
            '"a string"',
            '{"text": null}',
            '{"text": 5}',
            '{"text": ""}',
            '{"text": "a \\ud800 b"}',
            '{"text": "\\u0000"}',
            "[" * 100_000,
            '{"text":' * 50_000,
            "9" * 6000,
            '{"text": "x", "n": 1e999}',
            '{"text": NaN}',
            "\ufeff{}",
            '{"text": "a"} {"text": "b"}',
            "{",
            '{"text": "x"',
        ]
    ),
    st.text(max_size=30),
)
CONTENT = st.one_of(
    st.binary(max_size=300), st.text(max_size=300).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(LINES, max_size=5).map(lambda some: "\n".join(some).encode("utf-8", "surrogatepass")),
    st.sampled_from([b"", b"\n", b"\xef\xbb\xbftext", b"\xff\xfet\0e\0", b"a\0b", b"words " * 2000, b"a" * 100_000]),
)  # fmt: skip
NAMES = st.sampled_from(
    [
        b"a.txt",
        b"b.jsonl",
        b"c.md",
        b"caf\xe9.txt",
        b"d e.py",
        b".txt",
        b"x.bin",
        b"\n.txt",
        b"[bold].jsonl",
        b"sub/e.txt",
    ]
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_teacher(str(NANO)).tokenizer


@fuzz(60, files=st.dictionaries(NAMES, CONTENT, min_size=1, max_size=3), one=st.booleans())
def test_files(files, one, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, content in files.items():
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    before = contents(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            found = tokenize(corpus(os.fsdecode(path) if one else str(folder)), tokenizer)
            assert len(found.train) + len(found.held_out) > 0
        except UserError as error:
            str(error).encode("utf-8", "surrogateescape")
    assert contents(folder) == before
