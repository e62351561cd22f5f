"""Text becomes tokens once: the cache, its key and its damage."""

import shutil

import numpy as np
import pytest
from tokenizers import processors

from convert.core.errors import UserError
from convert.data import array_cache
from convert.data import text as data
from convert.data.corpus import corpus, is_held_out
from convert.data.text import Tokens, tokenize
from tests.data.conftest import WORDS, make_tokenizer


def same(a: Tokens, b: Tokens) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.starts, b.starts)


def test_tokens_are_those_of_the_documents(folder, tokenizer):
    """In order, each ended by the end token, in the split its key decides."""
    documents = list(corpus(str(folder)).documents())
    result = tokenize(corpus(str(folder)), tokenizer)
    for part, tokens in ((False, result.train), (True, result.held_out)):
        expected = [
            tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            for key, text in documents
            if is_held_out(key) == part
        ]
        assert tokens.ids.tolist() == sum(expected, [])
        assert tokens.starts.tolist() == np.cumsum([0] + [len(ids) for ids in expected[:-1]]).tolist()
    assert result.text_bytes == sum(len(text.encode()) for _, text in documents)
    assert len(result.held_out.starts) > 1


def test_the_root_does_not_matter(folder, tokenizer, tmp_path):
    """The same files elsewhere: the same held-out documents, the same cache."""
    first = tokenize(corpus(str(folder)), tokenizer)
    elsewhere = shutil.copytree(folder, tmp_path / "quite" / "another place")
    second = tokenize(corpus(str(elsewhere)), tokenizer)
    assert second.fingerprint == first.fingerprint
    assert same(second.held_out, first.held_out)


def test_read_from_the_cache_the_second_time(folder, tokenizer, monkeypatch):
    first = tokenize(corpus(str(folder)), tokenizer)
    monkeypatch.setattr(data, "_write_cache", None)
    second = tokenize(corpus(str(folder)), tokenizer)
    assert same(second.train, first.train) and same(second.held_out, first.held_out)
    assert (second.fingerprint, second.text_bytes) == (first.fingerprint, first.text_bytes)


def test_the_key_follows_text_and_tokenizer(folder, tokenizer):
    key = tokenize(corpus(str(folder)), tokenizer).fingerprint
    assert tokenize(corpus(str(folder)), make_tokenizer()).fingerprint == key
    assert tokenize(corpus(str(folder)), make_tokenizer(size=270)).fingerprint != key
    file = folder / "part0" / "0.txt"
    text = file.read_text()
    file.write_text(text.replace("the", "The", 1))
    assert tokenize(corpus(str(folder)), tokenizer).fingerprint != key
    file.write_text(text)
    file.rename(folder / "part0" / "zero.txt")  # its split may change with its key
    assert tokenize(corpus(str(folder)), tokenizer).fingerprint != key


def test_the_key_follows_the_end_token(folder, tokenizer):
    """Base and instruct tokenizers often differ in nothing else, and every document ends in it."""
    first, second = (tokenize(corpus(str(folder)), t) for t in (tokenizer, make_tokenizer(eos="<turn>")))
    assert first.fingerprint != second.fingerprint
    assert second.train.ids[-1] != first.train.ids[-1]


def test_the_key_ignores_what_the_tokenizer_was_used_for(folder):
    """Padding and truncation of an earlier call stay in the tokenizer, but decide nothing here."""
    tokenizer = make_tokenizer()
    key = tokenize(corpus(str(folder)), tokenizer).fingerprint
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert tokenize(corpus(str(folder)), tokenizer).fingerprint == key


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # not in place: a test may still have it mapped
    file.write_bytes(content)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


DAMAGE = {
    "train": lambda entry: flip(entry / "train.npy"),
    "train-starts": lambda entry: flip(entry / "train_starts.npy"),
    "held-out": lambda entry: flip(entry / "held_out.npy"),
    "held-out-starts": lambda entry: flip(entry / "held_out_starts.npy"),
    "file-missing": lambda entry: (entry / "train.npy").unlink(),
    "meta-missing": lambda entry: (entry / "meta.json").unlink(),
    "meta-cut": lambda entry: (entry / "meta.json").write_text((entry / "meta.json").read_text()[:40]),
    "meta-other": lambda entry: (entry / "meta.json").write_text("[]"),
    "meta-number": lambda entry: edit(entry / "meta.json", '"text_bytes": ', '"text_bytes": 1'),
    "meta-key": lambda entry: edit(entry / "meta.json", "text_bytes", "text_bites"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_rebuilt(damage, folder, tokenizer, cache, capsys):
    """With a line that says so; the damaged one is kept aside."""
    good = tokenize(corpus(str(folder)), tokenizer)
    entry = cache / good.fingerprint
    assert capsys.readouterr().out == ""
    damage(entry)
    again = tokenize(corpus(str(folder)), tokenizer)
    assert same(again.train, good.train) and same(again.held_out, good.held_out)
    assert again.text_bytes == good.text_bytes
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"The token cache {entry} is damaged (" in out and "rebuilt" in out
    assert len([p for p in cache.iterdir() if ".damaged-" in p.name]) == 1


def test_a_cache_can_be_damaged_twice(folder, tokenizer, cache):
    """In one process: what was set aside the first time is not in the way."""
    entry = cache / tokenize(corpus(str(folder)), tokenizer).fingerprint
    for _ in range(2):
        flip(entry / "train.npy")
        assert tokenize(corpus(str(folder)), tokenizer).train.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("step", ["first file", "last file", "meta", "rename"])
def test_a_failure_leaves_no_partial_cache(step, folder, tokenizer, cache, monkeypatch):
    """Full disk, or killed: nothing lies under the key, and the next call succeeds."""
    calls = []

    def fail(real, at):
        def function(*args, **kwargs):
            calls.append(0)
            if len(calls) == at:
                raise OSError("No space left on device")
            return real(*args, **kwargs)

        return function

    with monkeypatch.context() as m:
        if step in ("first file", "last file"):
            m.setattr(np, "save", fail(np.save, 1 if step == "first file" else 4))
        elif step == "meta":
            m.setattr(array_cache, "write_text", fail(array_cache.write_text, 1))
        else:
            m.setattr(data.Path, "rename", fail(data.Path.rename, 1))
        with pytest.raises(UserError, match="cannot take them .No space left"):
            tokenize(corpus(str(folder)), tokenizer)
    assert calls
    assert list(cache.iterdir()) == []
    assert len(tokenize(corpus(str(folder)), tokenizer).train) > 100


def test_a_killed_writer_is_no_hindrance(folder, tokenizer, cache):
    """It leaves its folder of another name."""
    key = tokenize(corpus(str(folder)), tokenizer).fingerprint
    (cache / key).rename(cache / f"{key}.writing-abc")
    (cache / f"{key}.writing-abc" / "meta.json").unlink()
    assert tokenize(corpus(str(folder)), tokenizer).fingerprint == key
    assert (cache / key / "meta.json").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_split_by_tokens(tmp_path, tokenizer, count):
    """The last sixteenth of the stream is held out, and both parts know where documents begin."""
    names = [f"{i}.txt" for i in range(100) if not is_held_out(f"{i}.txt")][:count]
    for name in names:
        (tmp_path / name).write_text(" ".join(WORDS * 20))
    result = tokenize(corpus(str(tmp_path)), tokenizer)
    stream = (tokenizer(" ".join(WORDS * 20))["input_ids"] + [tokenizer.eos_token_id]) * count
    cut = int(len(stream) * 15 / 16)
    assert result.train.ids.tolist() == stream[:cut] and result.held_out.ids.tolist() == stream[cut:]
    assert result.train.starts.tolist() == [i * len(stream) // count for i in range(count)]
    assert result.held_out.starts.tolist() == [0]


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9.txt",
        b"\xff\xfe.md",
        "naïve 文字.txt".encode(),
        b"a\nb\x1b[31m.txt",
        b"-rf.txt",
        b" .txt",
        b"..jsonl.txt",
    ],
)
def test_files_have_any_name_and_the_same_place_in_any_locale(tmp_path, tokenizer, name):
    root = tmp_path / "odd"
    root.mkdir()
    with open(bytes(root) + b"/" + name, "w") as file:
        file.write("some text to read. " * 200)
    assert len(tokenize(corpus(str(root)), tokenizer).train) > 100
    as_ascii = name.decode("ascii", "surrogateescape")  # how a locale of ASCII would see it
    assert is_held_out(as_ascii) == is_held_out(name.decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("template, front", [("<turn> $A <turn>", 1), ("$A <turn>", 0), ("<turn> $A <end>", 1)])
def test_what_a_tokenizer_adds_behind_is_no_text(template, front, folder):
    """Documents begin as the tokenizer begins a text, and end with the end token alone."""
    tokenizer = make_tokenizer()
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<end>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<turn>", turn), ("<end>", end)]
    )
    found = tokenize(corpus(str(folder)), tokenizer).train
    for start, stop in zip(found.starts, [*found.starts[1:], len(found)], strict=True):
        ids = found.ids[start:stop].tolist()
        assert [i for i in ids if i in (turn, end)] == [turn] * front + [end] and ids[-1] == end
