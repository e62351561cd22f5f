"""Text becomes the same tokens every time, or one sentence says why not."""

import os
import shutil
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from convert.core.errors import UserError
from convert.data import corpus as corpora
from convert.data import text as data
from convert.data.corpus import corpus, is_held_out
from convert.data.text import Tokens, tokenize

WORDS = "the state of a scan does not grow with the text that it reads".split()


def make_tokenizer(size: int = 280, eos: str = "<end>") -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>", "<turn>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=eos, eos_token=eos, pad_token=eos)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def folder(tmp_path):
    """70 documents, more than are tokenised at once."""
    root = tmp_path / "texts"
    for i in range(70):
        file = root / f"part{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(WORDS[: 3 + i % 11]) + f" {i}\n")
    return root


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


def test_is_held_out_is_fixed():
    """For ever: or what was held out of one run is trained on by the next."""
    assert [i for i in range(100) if is_held_out(f"{i}.txt")] == [1, 18, 20, 39, 65, 71, 77, 85, 89, 97]
    assert sum(is_held_out(f"{i}") for i in range(8000)) / 8000 == pytest.approx(1 / 16, rel=0.15)


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
            m.setattr(data, "write_text", fail(data.write_text, 1))
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
        r"There is no data at .*nowhere.*Give 'stdlib', a file or folder of .txt, .md, .py, .jsonl, or hub:NAME",
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

    settings, exceptions = SimpleNamespace(HF_HUB_OFFLINE=False), SimpleNamespace(DatasetNotFoundError=KeyError)
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(config=settings, exceptions=exceptions, load_dataset=load_dataset)
    )
    monkeypatch.setattr(corpora, "is_hub_reachable", lambda: reachable)
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
    exceptions, settings = SimpleNamespace(DatasetNotFoundError=KeyError), SimpleNamespace(HF_HUB_OFFLINE=True)
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
