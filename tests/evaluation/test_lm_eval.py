"""lm-evaluation-harness's own evaluator on our models, from a folder of local tasks."""

import functools
import logging

import pytest

pytest.importorskip("lm_eval", reason="the extra [eval]")

from convert.core.errors import UserError
from convert.evaluate import main
from convert.evaluation import lm_eval
from experiments import lm_eval_parity

pytestmark = pytest.mark.filterwarnings("ignore")  # its, and those of its data sets


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def its_own_tasks_are_found_once():
    """It takes seconds to look through them."""
    from lm_eval import tasks

    look, found = tasks.TaskManager, functools.cache(tasks.TaskManager)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tasks, "TaskManager", lambda **given: (look if given.get("include_path") else found)(**given))
        yield


def test_it_gives_the_scores_of_our_scoring_methods(tmp_path):
    found = lm_eval_parity.compare("neox-nano", "names,brackets,copying", 8, tmp_path)
    assert len(found) == 6
    for task, scoring, ours, theirs in found:
        assert ours == theirs, (task, scoring)
    assert len({ours for *_, ours, _ in found}) > 2  # not one number by accident


def test_the_command_takes_a_folder(tmp_path, capsys):
    from convert.evaluation.tasks import TASKS

    lm_eval_parity.write_local_tasks([TASKS["keys"]], tmp_path / "local", 2)
    assert main(["neox-nano", "--lm-eval", str(tmp_path / "local"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "keys_likelihood" in shown and "keys_generation" in shown and "exact_match" in shown


def test_an_unknown_task_is_refused(tmp_path, capsys):
    assert main(["neox-nano", "--lm-eval", "arc_esy", "--out", str(tmp_path / "out")]) == 2
    assert "no task 'arc_esy'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_killed_evaluation_goes_on(tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    from convert.evaluation.tasks import TASKS
    from convert.models.loading import load_teacher

    lm_eval_parity.write_local_tasks([TASKS["keys"]], tmp_path / "local", 4)
    nano, real, asked = load_teacher("neox-nano"), HFLM._model_generate, []

    nano.model.generation_config.repetition_penalty = 1.5  # would punish copying

    def counted(self, *args, **kwargs):
        assert self.model.generation_config.repetition_penalty is None
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    def scores():
        return lm_eval.run_harness({"teacher": nano.model}, nano.tokenizer, str(tmp_path / "local"))

    monkeypatch.setattr(lm_eval, "BATCH", 1)
    monkeypatch.setattr(HFLM, "_model_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        scores()
    found = scores()
    assert len(asked) == 5  # two before the kill, the killed one, and the two that were left
    assert scores() == found and len(asked) == 5 and nano.model.generation_config.repetition_penalty == 1.5


def test_a_file_that_does_not_parse_is_said_with_its_line(tmp_path):
    import yaml

    (tmp_path / "bad.yaml").write_text("task: mine\ndoc_to_text: [unclosed\n")
    with pytest.raises(UserError, match=r"bad\.yaml, line 3 is not"):
        lm_eval.local_tasks(tmp_path, yaml)
    (tmp_path / "bad.yaml").write_text("task: mine\n")
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"data\.jsonl, line 2 is not"):
        lm_eval.local_tasks(tmp_path, yaml)
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "bad.yaml").write_text("group: x\n")
    with pytest.raises(UserError, match="has none"):
        lm_eval.local_tasks(tmp_path, yaml)


def test_without_network_a_public_task_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lm_eval, "is_hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["neox-nano", "--lm-eval", "arc_easy", "--limit", "2", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "could not be read" in error and "give a folder of local tasks" in error
    assert logging.getLogger("lm_eval").level == logging.ERROR


@pytest.mark.parametrize("change, words", [
    (("output_type: multiple_choice", "output_type: nonsense"), "could not do"),
    (("doc_to_choice: choices", "doc_to_choice: missing"), "could not do"),
])  # fmt: skip
def test_a_task_that_does_not_work_is_a_sentence(tmp_path, capsys, change, words):
    from convert.evaluation.tasks import TASKS

    lm_eval_parity.write_local_tasks([TASKS["keys"]], tmp_path / "local", 2)
    (tmp_path / "local" / "keys_generation.yaml").unlink()
    file = tmp_path / "local" / "keys_likelihood.yaml"
    file.write_text(file.read_text().replace(*change))
    assert main(["neox-nano", "--lm-eval", str(tmp_path / "local"), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_data_may_hold_any_character_and_must_be_utf_8(tmp_path):
    import yaml

    (tmp_path / "mine.yaml").write_text("task: mine\n")
    (tmp_path / "data.jsonl").write_text('{"a": "one\u2028two"}\n', encoding="utf-8")
    assert lm_eval.local_tasks(tmp_path, yaml) == ["mine"]
    (tmp_path / "data.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"must be UTF-8; .*data\.jsonl, line 2 is not"):
        lm_eval.local_tasks(tmp_path, yaml)
