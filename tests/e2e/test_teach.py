"""A teacher recorded once, and students that learn from the recording: whole commands."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import teach
from convert.data import recorded
from convert.run import main
from convert.training import STAGES
from tests.conftest import VOCAB
from tests.e2e.conftest import command, weights

EXACT = ("--set", "distill.precision=float32", "--set", "align.precision=float32")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A part for each of the three steps."""
    monkeypatch.setattr(recorded, "PART_TOKENS", 128)


def recording(teacher, text, out, *more):
    return [str(teacher), "--data", str(text), "--out", str(out), "--tiny", "--device", "cpu", *more]


def from_(folder):
    return ("--set", f"distill.teacher=cache:{folder}")


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def logged(run, name="train/loss"):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


def test_all_probabilities_give_the_run_that_the_teacher_gives(teacher, text, tmp_path, monkeypatch, capsys):
    assert teach.main(recording(teacher, text, tmp_path / "said", "--top-k", str(VOCAB), *EXACT)) == 0
    said = capsys.readouterr().out
    assert "153 kB at most: 398 bytes for each of 384 tokens" in said
    assert f"--set distill.teacher=cache:{tmp_path / 'said'}" in said.replace("\n", "")
    more = (*EXACT, "--set", "distill.evaluate_every=128")  # the teacher answers before it leaves
    assert main(command(teacher, text, tmp_path / "online", *more, to="linear")) == 0
    distill, seen = STAGES["distill"], []

    def watched(student, model, *others, **more):
        seen.append(model)
        return distill(student, model, *others, **more)

    monkeypatch.setitem(STAGES, "distill", watched)
    offline = command(teacher, text, tmp_path / "offline", *more, *from_(tmp_path / "said"), to="linear")
    assert main(offline) == 0 and seen == [None]
    assert logged(tmp_path / "offline") == pytest.approx(logged(tmp_path / "online"), rel=1e-3)
    gaps = [logged(tmp_path / name, "held_out/generation_gap") for name in ("online", "offline")]
    assert len(gaps[0]) == 3 and gaps[1] == gaps[0]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("online", "offline")]
    assert reports[1]["perplexity"]["student"] == pytest.approx(reports[0]["perplexity"]["student"], rel=1e-3)
    assert reports[1]["perplexity"]["teacher"] == reports[0]["perplexity"]["teacher"]  # it was loaded again
    step = reports[1]["settings"]["steps"][-1]
    assert step["teacher"] == f"cache:{tmp_path / 'said'}" and step["teacher_fingerprint"]


def test_killed_and_repeated_is_the_same_to_the_byte(teacher, text, tmp_path, monkeypatch):
    how = ("--top-k", "4", "--sample", "3")
    assert teach.main(recording(teacher, text, tmp_path / "straight", *how)) == 0
    arguments = recording(teacher, text, tmp_path / "killed", *how)
    child = os.fork()
    if child == 0:
        write = recorded.write_json
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        monkeypatch.setattr(recorded, "write_json", lambda file, c: die() if file.stem == "00001" else write(file, c))
        teach.main(arguments)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [f.name for f in sorted((tmp_path / "killed" / "parts").iterdir())] == [
        "00000.json",
        "00000.npy",
        "00001.npy",
    ]
    first = (tmp_path / "killed" / "parts" / "00000.npy").stat().st_mtime_ns
    assert teach.main(arguments) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "straight")
    assert (tmp_path / "killed" / "parts" / "00000.npy").stat().st_mtime_ns == first  # it was not done twice


def test_a_recording_of_something_else_is_one_sentence(teacher, text, tmp_path, capsys):
    said = from_(tmp_path / "said")
    assert teach.main(recording(teacher, text, tmp_path / "said", "--top-k", "3")) == 0
    other_text, other_teacher = tmp_path / "text", tmp_path / "teacher"
    shutil.copytree(text, other_text)
    (other_text / "0.txt").write_text("another cat sat on another mat. " * 20)
    shutil.copytree(teacher, other_teacher)
    changed = load_file(other_teacher / "model.safetensors")
    next(iter(changed.values())).add_(0.01)
    save_file(changed, other_teacher / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    for arguments, words in (
        (command(teacher, other_text, out, *said), "data: recorded"),
        (command(other_teacher, text, out, *said), "teacher: recorded"),
        (command(teacher, text, out, *said, "--seed", "1"), "seed: recorded 0, now 1"),
        (command(teacher, text, out, *said, "--set", "distill.seq_len=32"), "seq_len: recorded 64, now 32"),
        (command(teacher, text, out, *said, "--set", "distill.noise=0"), "noise: recorded 0.1, now 0.0"),
        (command(teacher, text, out, *said, "--set", "distill.tokens=1024"), "steps: recorded 3, now 8"),
        (command(teacher, text, out, *said, "--set", "distill.reverse_kl=0.5"), "cannot be reverse_kl, which needs"),
        (command(teacher, text, out, "--set", f"align.{said[1].split('.', 1)[1]}"), "cannot be cosine_distance, which"),
        (command(teacher, text, out, *from_(text)), "names a finished recording of a teacher"),
        (recording(teacher, other_text, tmp_path / "said", "--top-k", "3"), "data: recorded"),
        (recording(teacher, text, tmp_path / "said", "--top-k", "4"), "top_k: recorded 3, now 4"),
        (recording(teacher, text, text), "A recording needs a folder of its own"),
        (recording(teacher, text, tmp_path / "new", "--top-k", "0"), "--top-k and --sample are both 0"),
        (recording(teacher, text, tmp_path / "new", "--top-k", str(VOCAB + 1)), "--top-k counts tokens of the voc"),
        (recording(teacher, text, tmp_path / "new", "--step", "handover"), "for a step that trains on text: align, di"),
        (
            recording(teacher, text, tmp_path / "new", "--step", "align"),
            "has cosine_distance, which compares attention",
        ),
    ):
        capsys.readouterr()
        assert (teach.main if arguments[1] == "--data" else main)(arguments) == 2, words
        error = capsys.readouterr().err
        (line,) = (line for line in error.splitlines() if line.startswith("error:"))
        assert words in line and "defect" not in error
    assert not out.exists() and not (tmp_path / "new").exists()


def test_a_damaged_part_ends_the_run_and_is_recorded_anew(teacher, text, tmp_path, capsys):
    said = tmp_path / "said"
    assert teach.main(recording(teacher, text, said)) == 0
    arguments = command(teacher, text, tmp_path / "run", *from_(said), to="linear")
    part = said / "parts" / "00002.npy"
    content, whole = bytearray(part.read_bytes()), part.read_bytes()
    content[-1] ^= 1
    part.write_bytes(content)
    assert main(arguments) == 2
    assert "00002.npy is not what was written: its hash is another one. Repeat" in capsys.readouterr().err
    part.unlink()
    assert main(arguments) == 2
    assert "lacks its part 00002.npy. Repeat" in capsys.readouterr().err
    assert teach.main(recording(teacher, text, said)) == 0
    assert part.read_bytes() == whole
    assert main(arguments) == 0
    assert main(command(teacher, text, tmp_path / "straight", *from_(said), to="linear")) == 0
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(value, resumed[name]) for name, value in weights(tmp_path / "straight").items())


def test_a_plan_says_how_large_it_will_be_and_a_disk_too_small_is_refused(teacher, text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "said"
    assert teach.main(recording(teacher, text, out, "--plan")) == 0
    assert "99.1 kB at most: 258 bytes for each of 384 tokens" in capsys.readouterr().out and not out.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=99_071))
    assert teach.main(recording(teacher, text, out)) == 2
    assert "needs about 99.1 kB more on disk" in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=99_072))
    assert teach.main(recording(teacher, text, out)) == 0
    capsys.readouterr()
    assert main(command(teacher, text, tmp_path / "run", *from_(out), "--plan")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the teacher is loaded at the start, leaves the memory before distill, and is loaded again" in shown
