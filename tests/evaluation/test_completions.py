"""Completions of a teacher: drawn once, the same after a kill, without silence and loops."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from convert.core import json_lines
from convert.core.errors import UserError
from convert.data.corpus import corpus
from convert.data.prompts import encode
from convert.evaluation import completions
from convert.evaluation.completions import Sampling, prepare
from convert.models.catalog import NANO
from convert.models.loading import Teacher, load_teacher
from tests.evaluation.scripted import Scripted, chatty_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(completions, "PROMPTS", (2, 2))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def nano() -> Teacher:
    return load_teacher(str(NANO))


def lines(cache) -> list[dict]:
    (file,) = (cache / "completions").glob("*.jsonl")
    return json_lines.read(file)


def conversations(data) -> list[tuple[list[int], list[bool]]]:
    found = []
    for tokens in (data.train, data.held_out):
        for start, end in zip(tokens.starts, [*tokens.starts[1:], len(tokens)], strict=True):
            found.append((tokens.ids[start:end].tolist(), tokens.completions[start:end].tolist()))
    return found


def test_a_teacher_without_a_template_goes_on_from_its_tasks(nano, cache):
    """Prompts and completions fit the sequences; each is stored with what was drawn, end included."""
    data = prepare(corpus("teacher"), nano, 300, 48)
    rows = lines(cache)
    drawn = {tuple(row["ids"]) for row in rows}
    assert len(data.train) >= 300 or {row["round"] for row in rows} == {0, 1, 2, 3}
    for ids, mask in conversations(data):
        first = mask.index(True)
        assert all(mask[first:]) and tuple(ids[first:]) in drawn
        assert first <= 24 and len(ids) - first <= 24
    assert all(row["ids"].index(0) == len(row["ids"]) - 1 for row in rows if 0 in row["ids"])  # ends at the end token
    (cache / "completions").rename(cache / "away")
    again = prepare(corpus("teacher"), nano, 300, 48)  # of the arrays
    assert again.fingerprint == data.fingerprint and not (cache / "completions").exists()


@pytest.mark.parametrize("cut", ["a whole batch", "within a batch", "within a line"])
def test_sampling_that_was_killed_goes_on_with_the_same_texts(cut, nano, cache, monkeypatch):
    monkeypatch.setattr(completions, "BATCH_ROWS", 4)
    straight = conversations(prepare(corpus("teacher"), nano, 300, 48))
    (file,) = (cache / "completions").glob("*.jsonl")
    whole = file.read_bytes()
    written = whole.splitlines(keepends=True)
    half = len(written) // 2
    kept = {"a whole batch": written[:4], "within a batch": written[:half], "within a line": written[:half]}[cut]
    file.write_bytes(b"".join(kept) + (written[half][:20] if cut == "within a line" else b""))
    for folder in (cache / "tokens").iterdir():
        folder.rename(cache / folder.name)
    calls, generate = [], completions.generate
    monkeypatch.setattr(completions, "generate", lambda *a, **k: calls.append(0) or generate(*a, **k))
    assert conversations(prepare(corpus("teacher"), nano, 300, 48)) == straight
    assert {json.dumps(row) for row in lines(cache)} == {line.decode().strip() for line in written}
    assert 0 < len(calls) < len(written) // 4


def test_a_row_that_was_changed_is_refused(nano, cache):
    prepare(corpus("teacher"), nano, 100, 48)
    (file,) = (cache / "completions").glob("*.jsonl")
    rows = [row | {"ids": [10**6]} for row in json_lines.read(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in (cache / "tokens").iterdir():
        folder.rename(cache / folder.name)
    with pytest.raises(UserError, match=r"Line 1 of .* is no completion that was written there. Remove the file"):
        prepare(corpus("teacher"), nano, 100, 48)


def prompts(tmp_path, *rows) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"teacher:{file}"


def test_prompts_of_a_file_in_the_teachers_template(nano, tmp_path, capsys):
    """The last answer of a row is replaced; a prompt that leaves no room is counted."""
    teacher = dataclasses.replace(nano, tokenizer=chatty_tokenizer())
    messages = [
        {"role": role, "content": text} for role, text in (("user", "def add("), ("assistant", "never this answer"))
    ]
    spec = prompts(tmp_path, {"messages": messages}, {"prompt": "import os", "n": 1}, {"prompt": "x = 1\n" * 40})
    found = conversations(prepare(corpus(spec), teacher, 60, 48))
    assert "1 of 3 prompts have more than 24 tokens" in capsys.readouterr().out
    begun = {tuple(ids[: mask.index(True)]) for ids, mask in found}
    assert begun == {tuple(encode(teacher.tokenizer, text, chat=True)) for text in ("def add(", "import os")}


def test_messages_for_a_teacher_without_a_template_are_refused(nano, tmp_path):
    spec = prompts(tmp_path, {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(UserError, match="Line 1 of .* has messages, and the teacher has no chat template"):
        prepare(corpus(spec), nano, 60, 48)
    with pytest.raises(UserError, match="has 1 prompts, and none of at most 24 tokens. Give shorter ones"):
        prepare(corpus(prompts(tmp_path, {"prompt": "x = 1\n" * 40})), nano, 60, 48)


@pytest.mark.parametrize("writes", ["loops", "silence"])
def test_nothing_but_loops_or_silence_is_refused(writes, nano):
    tokenizer: PreTrainedTokenizerFast = nano.tokenizer
    model = Scripted(lambda ids, _: 50 if writes == "loops" else tokenizer.eos_token_id, 1 << 12)
    teacher = dataclasses.replace(nano, model=model.eval())
    with pytest.raises(UserError, match=r"none of the \d+ that the teacher wrote is. Give other prompts"):
        prepare(corpus("teacher"), teacher, 300, 48)


def test_too_few_prompts_are_completed_again_and_said(nano, tmp_path, capsys):
    how = Sampling(new_tokens=8, rounds=2)
    spec = prompts(tmp_path, *({"prompt": f"def f{i}(x):"} for i in range(6)))
    data = completions.completions(corpus(spec), nano, 10_000, 48, how)
    assert "completed every prompt 2 times" in " ".join(capsys.readouterr().out.split())
    assert len(data.train.starts) + len(data.held_out.starts) <= 12
    assert np.all(np.diff(data.train.starts) <= 40 + 8)
