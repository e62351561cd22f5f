"""Probes at a length in tokens."""

import pytest

from convert.core.errors import UserError
from convert.evaluation.by_length import FULL, fitted, probes_for, scores_by_length
from convert.evaluation.scoring import prompt_ids
from convert.evaluation.tasks import TASKS
from convert.models.catalog import NANO
from convert.models.loading import load_teacher
from tests.evaluation.scripted import Scripted, chatty_tokenizer, knowing

PROBES = [task for task in TASKS.values() if task.example is not None]


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("task", PROBES, ids=lambda task: task.name)
def test_an_example_fills_its_length_and_hides_the_same_at_any(task, length):
    tokenizer = chatty_tokenizer()
    item = fitted(tokenizer, task, length, lambda characters: task.example(5, 3, characters))
    tokens = len(prompt_ids(tokenizer, task, item.prompt)) + task.max_new_tokens
    assert FULL * length <= tokens <= length
    other = task.example(5, 3, 1)
    assert (item.answer, item.choices) == (other.answer, other.choices)
    assert item.prompt.split("\n")[-1] == other.prompt.split("\n")[-1]


def test_what_is_longer_without_any_text_is_refused():
    with pytest.raises(UserError, match="An example of multi_value needs more than 40 tokens; give larger"):
        task = TASKS["multi_value"]
        fitted(chatty_tokenizer(), task, 40, lambda characters: task.example(0, 0, characters))


def test_an_oracle_finds_everything_at_every_length_and_python_is_asked_where_there_is_no_template():
    tokenizer = load_teacher(str(NANO)).tokenizer
    tasks = probes_for(tokenizer)
    assert [task.name for task in tasks] == ["multi_key", "multi_value", "tracking"]
    assert [task.name for task in probes_for(chatty_tokenizer())] == [f"{task.name}_chat" for task in tasks]
    lengths = (256, 512)
    known = [
        (task, [fitted(tokenizer, task, length, lambda c, n=n, task=task: task.example(n, 0, c)) for n in range(2)])
        for task in tasks
        for length in lengths
    ]
    oracle = knowing(tokenizer, known)
    model = Scripted(lambda ids, _: oracle(ids), len(tokenizer))
    rows = scores_by_length({"teacher": model}, tokenizer, tasks, lengths, 2)
    assert [(task, length) for _, task, length, _ in rows] == [(t.name, n) for t in tasks for n in lengths]
    assert all(scores == {"generation": 1, "likelihood": 1} for *_, scores in rows)
