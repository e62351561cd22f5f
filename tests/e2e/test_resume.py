"""A run that was killed, stopped or damaged goes on, or says in one sentence why it cannot."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.data import hub
from convert.exporting import images, verify
from convert.run import main
from convert.runs import checkpoint, tracking
from convert.runs.ledger import locked
from tests.e2e.conftest import command, weights


def killed_at(instant: str, arguments: list[str], monkeypatch) -> int:
    """Run the command in a forked process that kills itself, as by SIGKILL, at an instant; the signal it died of."""
    child = os.fork()
    if child == 0:
        die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if instant == "before a checkpoint's rename":
            monkeypatch.setattr(torch, "save", lambda tensor, file: (file.write(b"half"), file.flush(), die()))
        elif instant == "after a checkpoint":
            save = checkpoint.StepFolder.save
            monkeypatch.setattr(
                checkpoint.StepFolder, "save", lambda self, step, state: (save(self, step, state), step == 2 and die())
            )
        elif instant == "after the weights, before DONE":
            write = checkpoint.write_json
            monkeypatch.setattr(
                checkpoint,
                "write_json",
                lambda path, content: die() if path.parent.name == "4-distill" else write(path, content),
            )
        elif instant == "between two steps":
            drop = checkpoint.StepFolder.drop_weights
            monkeypatch.setattr(
                checkpoint.StepFolder,
                "drop_weights",
                lambda self: die() if self.folder.name == "1-align" else drop(self),
            )
        elif instant == "in the export":
            monkeypatch.setattr(verify, "export", die)
            monkeypatch.setattr(images, "export", die)
        main(arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def keys(found, path=""):
    """Of everything in it, with where it is."""
    inside = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return {path}.union(*(keys(value, f"{path}.{key}") for key, value in inside))


INSTANTS = [
    "before a checkpoint's rename",
    "after a checkpoint",
    "after the weights, before DONE",
    "between two steps",
    "in the export",
]


EVERY_STEP = ("--set", "align.save_every=0", "--set", "distill.save_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def straight(quiet, place, teacher, text):
    """A run that nothing stopped; the first test that needs it makes it. Not to be changed."""
    if not (place / "straight").exists():
        assert main(command(teacher, text, place / "straight", *EVERY_STEP)) == 0
    return place / "straight"


@pytest.fixture
def finished(quiet, place, teacher, text, tmp_path):
    """The arguments of a run to linear attention that is finished; its folder is `tmp_path / "run"`."""
    if not (place / "linear").exists():
        assert main(command(teacher, text, place / "linear", to="linear")) == 0
    shutil.copytree(place / "linear", tmp_path / "run")
    return command(teacher, text, tmp_path / "run", to="linear")


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_repeated_is_bit_identical(instant, teacher, text, straight, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    arguments = command(teacher, text, killed, *EVERY_STEP)
    assert killed_at(instant, arguments, monkeypatch) == signal.SIGKILL
    assert not (killed / "report.json").exists()
    assert main(arguments) == 0
    shipped = [
        {f.name: f.read_bytes() for f in (run / "model").iterdir() if f.name != "README.md"}
        for run in (straight, killed)
    ]
    assert shipped[0] == shipped[1]  # the card has times
    reports = [json.loads((run / "report.json").read_text()) for run in (straight, killed)]
    assert keys(reports[0]) == keys(reports[1])  # a resumed run tells the same, no more and no less
    left = [{str(file.relative_to(run)) for file in (run / "steps").rglob("*")} for run in (straight, killed)]
    assert left[0] == left[1] and len([name for name in left[0] if name.endswith("student")]) == 1
    losses = [
        [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (straight, killed)
    ]
    assert losses[0] == losses[1]


def test_sigterm_saves_and_says_how_to_go_on(teacher, text, tmp_path, monkeypatch, capsys):
    log = tracking.Track.log
    monkeypatch.setattr(
        tracking.Track, "log", lambda self, *a: (log(self, *a), a[0] == 2 and os.kill(os.getpid(), signal.SIGTERM))
    )
    assert main(command(teacher, text, tmp_path / "run")) == 130
    assert "Stopped at step 2 of 3; it is saved. The same command goes on from there." in capsys.readouterr().err
    assert (tmp_path / "run" / "steps" / "1-align" / "checkpoint-2").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the caller's again


def test_a_finished_run_is_skipped_and_changed_settings_are_refused(finished, tmp_path, capsys):
    done = tmp_path / "run" / "steps" / "2-distill" / "DONE"
    before = done.stat().st_mtime_ns
    assert main(finished) == 0
    assert done.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*finished, "--set", "distill.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "steps.distill.settings.lr: 0.002 -> 0.5" in error and "--fresh" in error
    assert main([*finished, "--set", "distill.lr=0.5", "--fresh"]) == 0
    assert (tmp_path / "run.old-1" / "report.json").exists()


def test_a_damaged_checkpoint_is_set_aside(straight, teacher, text, tmp_path, monkeypatch, capsys):
    arguments = command(teacher, text, tmp_path / "run", "--set", "distill.save_every=0")
    assert killed_at("after a checkpoint", arguments, monkeypatch) == signal.SIGKILL
    newest = tmp_path / "run" / "steps" / "4-distill" / "checkpoint-2" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(arguments) == 0
    assert "damaged" in capsys.readouterr().out
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def test_another_teacher_under_the_same_name_is_refused(teacher, text, tmp_path, capsys):
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    assert main(command(mine, text, tmp_path / "run", to="linear")) == 0
    weights = load_file(mine / "model.safetensors")
    next(iter(weights.values())).add_(0.01)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    assert main(command(mine, text, tmp_path / "run", to="linear")) == 2
    assert "teacher_fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, words",
    [
        ("DONE", "is damaged. Start again with --fresh"),
        ("student/model.safetensors", "are damaged"),
        ("student/config.json", "are damaged"),
    ],
)
def test_damaged_results_are_named(name, words, finished, tmp_path, capsys):
    file = tmp_path / "run" / "steps" / "2-distill" / name
    whole = bytearray(file.read_bytes())
    if file.suffix == ".safetensors":
        whole[-20] ^= 1  # one bit of a weight
    else:
        del whole[len(whole) // 2 :]
    file.write_bytes(whole)
    assert main(finished) == 2
    assert words in (error := capsys.readouterr().err) and "defect" not in error


def test_one_process_at_a_time(finished, tmp_path, capsys):
    with locked(tmp_path / "run"):
        for more in ([], ["--fresh"]):
            assert main([*finished, *more]) == 2
            assert "another one holds" in capsys.readouterr().err
    assert main(finished) == 0


def test_a_streamed_run_goes_on_with_the_data_that_it_stopped_at(teacher, tmp_path, monkeypatch):
    """Also where the cache is gone: the checkpoint knows where the data lie in their files."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(hub, "is_hub_reachable", lambda: False)
    (tmp_path / "rows").mkdir()
    for i in range(2):
        rows = [{"text": f"{i} {n}: " + "the cat sat on the mat. " * (3 + n % 5)} for n in range(60)]
        (tmp_path / "rows" / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = f"stream:{tmp_path / 'rows'}"
    assert main(command(teacher, stream, tmp_path / "straight", *EVERY_STEP, to="linear")) == 0
    arguments = command(teacher, stream, tmp_path / "killed", *EVERY_STEP, to="linear")
    assert killed_at("after a checkpoint", arguments, monkeypatch) == signal.SIGKILL
    state = json.loads((tmp_path / "killed" / "steps" / "1-align" / "checkpoint-2" / "state.json").read_text())
    assert state["stream"]["places"] and state["stream"]["of"]
    shutil.rmtree(tmp_path / "cache")
    assert main(arguments) == 0
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(value, weights(tmp_path / "killed")[name])
