"""Instruction distillation in whole runs: from the teacher, killed while it samples, and from a file of messages."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import AutoTokenizer

from convert.evaluation import completions
from convert.run import main
from tests.e2e.conftest import command, weights

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


def killed_after_a_batch_and_a_half(arguments: list[str], monkeypatch) -> int:
    """Run the command in a forked process that dies while it writes its second batch; the signal it died of."""
    child = os.fork()
    if child == 0:
        append, calls = completions.json_lines.append, []

        def half(file, rows):
            calls.append(0)
            append(file, rows if len(calls) == 1 else rows[:2])
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(completions.json_lines, "append", half)
        main(arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def test_from_the_teacher_killed_in_sampling(teacher, text, tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "BATCH_ROWS", 4)
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache-1"))
    assert main(command(teacher, text, tmp_path / "straight", to="hybrid-kda")) == 0
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache-2"))
    arguments = command(teacher, text, tmp_path / "killed", to="hybrid-kda")
    assert killed_after_a_batch_and_a_half(arguments, monkeypatch) == signal.SIGKILL
    (sampled,) = (tmp_path / "cache-2" / "completions").glob("*.jsonl")
    assert len(sampled.read_text().splitlines()) == 6 and not (tmp_path / "killed" / "ledger.json").exists()
    assert main(arguments) == 0
    resumed = weights(tmp_path / "killed")
    assert all(torch.equal(value, resumed[name]) for name, value in weights(tmp_path / "straight").items())
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert [step["name"] for step in report["stages"]] == ["align", "distill", "instruct"]
    ledger = json.loads((tmp_path / "killed" / "ledger.json").read_text())
    for step in (report["settings"]["steps"][-1], ledger["steps"][-1]):
        assert step["data"] == "teacher" and step["settings"]["masking"] == "completions" and step["data_fingerprint"]
    line = (
        "Step instruct trained on what its teacher wrote after training prompts of the tasks; only completions are"
        " targets."
    )
    assert line in (tmp_path / "killed" / "report.md").read_text()


@pytest.fixture
def instructed(teacher, tmp_path):
    """The tiny teacher with a chat template."""
    folder = tmp_path / "instructed"
    shutil.copytree(teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_from_a_file_of_messages(instructed, text, tmp_path, capsys):
    file = tmp_path / "chats" / "a.jsonl"
    file.parent.mkdir()
    turns = [("user", "who sat?"), ("assistant", "the cat"), ("user", "where?"), ("assistant", "on the mat")]
    rows = [{"messages": [{"role": role, "content": f"{said} {i}"} for role, said in turns]} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = command(instructed, text, tmp_path / "run", "--set", f"instruct.data={file.parent}", to="hybrid-kda")
    assert main([*arguments, "--plan"]) == 0
    assert "targets are completions" in " ".join(capsys.readouterr().out.split())
    assert main(arguments) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["settings"]["steps"][-1]["data"] == str(file.parent)
    # whole conversations fill no sequence to its end: padding is not counted
    assert 0 < report["stages"][-1]["tokens"] < 384 and report["stages"][-1]["loss_last"] > 0
    assert report["tokens"]["total"] == sum(stage["tokens"] for stage in report["stages"])
    with file.open("a") as more:
        more.write(json.dumps(rows[0]) + "\n")
    assert main(arguments) == 2
    assert "steps.instruct.data_fingerprint" in capsys.readouterr().err


WRONG = {
    "text": ("a.txt", "words", "Step instruct: masking=completions needs conversations; "),
    "roles": ("a.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "Line 1 of"),
    "prompts": ("teacher:a.jsonl", '{"prompt": ""}', "has an empty prompt"),
    "missing": ("teacher:b.jsonl", "", "Prompts for the teacher are a file, written teacher:FILE"),
    "nowhere": ("nowhere", "", "There is no data at 'nowhere'"),
}


@pytest.mark.parametrize("more", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize("data, content, words", WRONG.values(), ids=WRONG)
def test_wrong_data_are_refused_before_weights_are_loaded(
    data, content, words, more, teacher, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("convert.domains.language.load_teacher", None)
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / data.removeprefix("teacher:")).write_text(content)
    arguments = command(teacher, text, tmp_path / "run", "--set", f"instruct.data={data}", *more, to="hybrid-kda")
    assert main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_messages_need_a_template(teacher, text, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    arguments = command(
        teacher, text, tmp_path / "run", "--set", f"instruct.data={tmp_path / 'a.jsonl'}", to="hybrid-kda"
    )
    assert main(arguments) == 2
    assert "has messages, and the teacher has no chat template to render them" in capsys.readouterr().err
