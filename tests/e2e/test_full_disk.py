"""A full disk is one sentence at whatever writer it happens, and the same command goes on."""

import pytest

from convert.run import main
from tests.e2e.conftest import command


def full(*_, **__):
    raise OSError(28, "No space left on device")


def full_in_torch(*_, **__):
    raise RuntimeError(
        "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file write failed"
    )


WRITERS = {  # in the order in which a run writes
    "tokens": ("convert.data.text.np.save", full),
    "ledger": ("convert.runs.ledger.write_json", full),
    "metrics": ("convert.core.json_lines.append", full),
    "checkpoint": ("torch.save", full_in_torch),
    "student": ("convert.models.saving.write_file", full),
    "answers": ("convert.evaluation.runner.json_lines.append", full),
    "evaluation": ("convert.evaluation.runner.write_json", full),
    "model": ("convert.exporting.hub.write_files", full),
    "check": ("convert.exporting.verify.check_in_clean_process", full_in_torch),
    "report": ("convert.pipeline.write_json", full),
    "page": ("convert.reports.page.write_text", full),
    "hashes": ("convert.core.manifest.write_json", full),
}


def test_a_disk_that_is_full_at_any_writer_is_a_sentence_and_the_same_command_goes_on(teacher, text, tmp_path, capsys):
    arguments = command(teacher, text, tmp_path / "run", "--set", "align.save_every=0", "--set", "distill.save_every=0")
    for writer, (name, failure) in WRITERS.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(name, failure)
            assert main(arguments) == 2, writer
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            said.startswith("error: ") and ("goes on" in said or "Free some space" in said) and "defect" not in said
        ), (writer, said)
        assert not list(tmp_path.rglob("*.writing")), writer
    assert main(arguments) == 0
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "metrics.jsonl").read_text().count(
        "\n"
    ) == 6


def test_a_full_disk_is_one_sentence(teacher, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.save", full)
    assert main(command(teacher, text, tmp_path / "run", "--set", "align.save_every=0")) == 2
    assert "Free some space; the same command goes on from the last one." in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("convert.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main(command(teacher, text, tmp_path / "other")) == 2
    assert "1e+03 B free" in (error := capsys.readouterr().err) or "kB free" in error


def test_space_counts_what_the_run_has_written(teacher, text, tmp_path, monkeypatch):
    from convert.planning.plan import Plan, check_space

    plan = Plan("t", "linear", "stdlib", "cpu", "tokens", disk_bytes=1000)
    monkeypatch.setattr("convert.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 600})())
    (tmp_path / "run").mkdir()
    assert "needs about 1 kB more" in check_space(plan, tmp_path / "run")
    (tmp_path / "run" / "checkpoint").write_bytes(b"x" * 500)
    assert check_space(plan, tmp_path / "run") is None
