"""What cannot work is refused in one sentence before anything is loaded."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convert import pipeline
from convert.core.errors import UserError
from convert.planning import machine_speed
from convert.run import main
from tests.e2e.conftest import command


def test_an_out_that_belongs_to_something_else_is_refused(teacher, text, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        assert main(command(teacher, text, tmp_path / "thesis", *more)) == 2
        assert "Give another --out." in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "out, data, words",
    [
        ("first", "text", "is the teacher"),
        ("first/next", "text", "lies inside the teacher"),
        ("text/new", "text", "lies inside the data"),
        ("first", "first/data.txt", "is the teacher"),
        ("holder", "holder/data", "holds the data"),
        ("holder", "link", "holds the data"),
    ],
)
def test_a_run_never_moves_or_becomes_what_it_reads(teacher, tmp_path, monkeypatch, capsys, out, data, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher, "first/model")
    for folder in ("text", "holder/data"):
        Path(folder).mkdir(parents=True)
        Path(folder, "a.txt").write_text("some words to read. " * 500)
    Path("first/data.txt").write_text("some words to read. " * 500)
    Path("link").symlink_to("holder/data")
    for folder in ("first", "holder"):
        Path(folder, "ledger.json").write_text("{}")
    before = sorted(map(str, tmp_path.rglob("*")))
    for more in ([], ["--fresh"]):
        assert main(command("first", data, out, *more, to="linear")) == 2
        said = capsys.readouterr().err
        assert (
            "--out must be apart from what a run reads" in said and words in said or (not more and "is a run" in said)
        ), said
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["--to", "mamba3"], "Unknown target 'mamba3'. Nearest: mamba"),
        (["--set", "distil.lr=1"], "this recipe's steps are linear, align, handover, forget, distill"),
        (["--tasks", "nmes"], "There is no task 'nmes'. Nearest: names"),
        (["--set", "distill.speed=1"], "has no field 'speed'; it has"),
        (["--set", "distill.lr=fast"], "lr must be a finite number; got 'fast'"),
        (
            ["--set", "distill.trains=norm"],
            "one of feature_maps, mixers, kept_attention, mlps, norms, embeddings, head",
        ),
        (["--set", "distill.trains=mlps - everything"], "trains must choose parameters of the student, one or more"),
        (["--set", "align"], "--set takes STEP.FIELD=VALUE"),
        (["--set", "distill.lr=-1"], "lr must be within 0 .. 10"),
        (
            ["--set", "distill.seq_len=4096", "--set", "distill.batch_tokens=4096"],
            "must fit the teacher's 512 positions",
        ),
        (["--set", "distill.batch_tokens=100"], "a batch must be whole sequences"),
        (["--tokens", "many"], "A number of tokens is written 20000, 500k, 12M or 1B; got 'many'"),
        (["--set", "distill.noise=1.5"], "noise must be within 0 .. 1; got '1.5'"),
        (["--set", "distill.loss_chunk=0"], "loss_chunk must be within 1 .."),
        (["--set", "distill.temperature=0"], "temperature must be within 0.01 .. 100; got 0"),
        (["--set", "distill.forward_kl=0"], "a loss needs a term"),
        (
            ["--set", "distill.objective=energy_mse"],
            "distill compares logits and layer outputs; its objective cannot be energy_mse",
        ),
        (["--set", "distill.block_l2_distance=1"], "cannot be block_l2_distance, which compares block outputs"),
        (["--set", "align.objective=block_mse"], "There is no term 'block_mse'. Nearest: block_energy_mse"),
        (["--set", "handover.conv=0"], "conv must be within 1 .. 64; got '0'"),
        (["--set", "forget.rate=-1"], "rate must be within 0 .. 10; got '-1'"),
        (["--seed", "-1"], "--seed must be a whole number within 0 .. 9,223,372,036,854,775,807; got '-1'"),
        (["--tokens", "0.5"], "A number of tokens is written"),
        (["--tokens", "1k"], "--tiny chooses the sizes itself"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--data", "/no/such/place"], "There is no data at '/no/such/place'"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(more, words, teacher, text, tmp_path, capsys):
    assert main(command(teacher, text, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_out_under_a_file_is_refused_before_anything_is_loaded(teacher, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("convert.domains.language.load_teacher", None)
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(command(teacher, text, out)) == 2
        assert f"--out must be a folder; {tmp_path / 'file'} is a file." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name, given", [("neox-nano", "neox-nano"), ("mine", "mine"), ("mine", "~/mine")])
def test_only_a_local_teacher_is_remembered_by_its_place(name, given, teacher, text, tmp_path, monkeypatch, capsys):
    """An alias stays one, whatever folder of that name lies about."""

    def open_run(out, settings, fresh):
        raise UserError(f"it is {settings['teacher']}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(teacher, name)
    monkeypatch.setattr(pipeline, "open_run", open_run)
    assert main(command(given, text, "out", to="linear")) == 2
    assert f"it is {tmp_path / 'mine' if name == 'mine' else name}\n" in capsys.readouterr().err


BAD_EDITS = [
    ("gate-swa", "edit.keep=0,7", "kept layers must be within 0 .. 2"),
    ("gate-swa", "edit.keep=0,1,2", "not be all of them"),
    ("gate-swa", "edit.keep=some", "auto or auto:6; got 'some'"),
    ("gate-swa", "edit.window=0", "window must be within 1"),
    ("mla", "edit.kv_rank=100000", "kv_rank must be at most 32"),
    ("mla", "edit.rope_dim=6", "rope_dim must be even and at most the 2"),
    ("mla", "edit.cache_budget=0.01", "Raise it"),
    ("mla", "edit.cache_budget=2", "within 0.001 .. 1"),
    ("mla", "edit.shape=native", "this teacher has biases. Take edit.shape=exact"),
    ("gate-swa", "edit.window=64", "must be shorter than the training sequences"),
    ("mamba2", "linear.keep=auto:3", "give both the same keep"),
    ("mla", "edit.shape=round", "one of exact, native"),
    ("mla", "edit.calibration=0", "needs the layers' inputs"),
    ("hybrid-kda", "edit.start=refitted edit.calibration=0", "is refitted on some text"),
    ("hybrid-kda", "edit.decay_start=calibrated edit.calibration=0", "needs how far the layer's heads look back"),
    ("hybrid-gdn", "edit.calibration=0", "needs how far the layer's heads look back"),
    ("hybrid-gdn", "edit.decay_start=mamba edit.gate_start=open edit.calibration=0", "needs the layer's inputs"),
]


@pytest.mark.parametrize("to, setting, words", BAD_EDITS, ids=[setting for _, setting, _ in BAD_EDITS])
def test_edits_that_cannot_be_are_refused_before_anything_is_loaded(
    to, setting, words, teacher, text, tmp_path, capsys
):
    options = [word for one in setting.split() for word in ("--set", one)]
    assert main(command(teacher, text, tmp_path / "run", *options, to=to)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_latent_attention_is_where_a_conversion_ends(teacher, text, tmp_path, capsys):
    assert main(command(teacher, text, tmp_path / "first", to="mla")) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "first", text, tmp_path / "second")) == 2
    assert "a conversion ends with mla: no other mixer can start from it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["run", "neox-nano", "--to", "mamba"], ["evaluate", "runs/x"], ["generate", "runs/x", "a"]]
)
def test_ctrl_c_while_a_command_imports_is_a_line(arguments, tmp_path):
    """torch is one that never stops importing, and would swallow an exception."""
    endless = (
        "import time\nprint('importing', flush=True)\nwhile True:\n    try:\n        time.sleep(60)\n    except"
        " BaseException:\n        pass\n"
    )
    (tmp_path / "torch.py").write_text(endless)
    started = subprocess.Popen(
        [sys.executable, "-m", f"convert.{arguments[0]}", *arguments[1:]],
        cwd=Path(pipeline.__file__).parent.parent,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert started.stdout.readline() == "importing\n"
        started.send_signal(signal.SIGINT)
        _, error = started.communicate(timeout=20)
    finally:
        started.kill()
    assert (started.returncode, error) == (130, "Stopped before anything began.\n")


def test_plan_trains_and_writes_nothing(teacher, text, tmp_path, capsys):
    machine_speed.matmul_rate.cache_clear()  # what another test measured is kept elsewhere
    assert main(command(teacher, text, tmp_path / "run", "--plan")) == 0
    printed = capsys.readouterr().out
    assert "distill" in printed and "assumes" in printed
    assert not (tmp_path / "run").exists()
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [machine_speed.NAME]
    assert main(command(teacher, "/no/such/place", tmp_path / "run", "--plan")) == 2
    assert "There is no data at '/no/such/place'" in capsys.readouterr().err
    own = ["--set", "distill.data=/no/other/place"]
    assert main(command(teacher, text, tmp_path / "run", "--plan", *own)) == 2
    assert "There is no data at '/no/other/place'" in capsys.readouterr().err
