"""The command from end to end on a tiny teacher: report, resume after SIGKILL, refusals, exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert import pipeline as conversion
from convert.core.errors import UserError
from convert.data.text import corpus
from convert.evaluation import perplexity as measure
from convert.evaluation import runner as evaluation
from convert.exporting import verify as shipping
from convert.models.student import ConvertedForCausalLM
from convert.run import main, number_of_tokens
from convert.runs import ledger as checkpoint
from convert.steps import swap as swaps
from tests.conftest import VOCAB, tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny GPT-NeoX and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tiny-neox")
    tiny_teacher("gpt_neox", tie_word_embeddings=False).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "<end>": 2} | {chr(c): c - 29 for c in range(32, 29 + VOCAB)} | {"\n": 96 + 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the cat sat on the mat and the dog sat on the log. " * (5 + i % 7))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No W&B, a cache of our own, and the clean process only where a test asks for it (it takes seconds)."""
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(
        shipping, "check_in_clean_process", lambda folder, ids, **_: _load(folder)(ids, use_cache=False).logits.float()
    )
    monkeypatch.setattr(measure, "PREFILL_SECONDS", 0.2)


def _load(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def command(teacher, text, out, *more, to="mamba2"):
    return [
        str(teacher),
        "--to",
        to,
        "--data",
        str(text),
        "--out",
        str(out),
        "--tiny",
        "--wandb",
        "disabled",
        "--device",
        "cpu",
        *more,
    ]


@pytest.mark.parametrize("target", ["linear", "mamba", "mamba2"])
def test_a_run_leaves_a_model_and_a_report(teacher, text, tmp_path, target):
    out = tmp_path / "run"
    assert main(command(teacher, text, out, to=target)) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"]["ratio"] == pytest.approx(
        report["perplexity"]["student"] / report["perplexity"]["teacher"]
    )
    assert 0 <= report["agreement"]["top1"] <= 1 and report["kl"]["mean_nats"] > 0
    assert report["tokens"]["total"] == 2 * 384 and report["seconds"]["total"] > 0 and report["seed"] == 0
    assert [s["name"] for s in report["stages"]] == ["align", "distill"]
    assert {"tokens", "seconds", "loss_first", "loss_last", "perplexity_after"} <= report["stages"][0].keys()
    _check_cache_bytes(report["cache_bytes"])
    assert len(set(report["cache_bytes"]["student"].values())) == 1  # a state does not grow
    assert report["versions"]["torch"] == torch.__version__
    if target == "linear":
        assert report["handover"] == {"max_abs_logit": None}
    else:
        assert (
            report["handover"]["max_abs_logit"] <= report["handover"]["allowed"]
            and report["handover"]["perplexity_change"] < 1e-4
        )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"], r["tokens"]) for r in rows] == [
        (s, i, 128 * i + t) for s, t in (("align", 0), ("distill", 384)) for i in (1, 2, 3)
    ]
    assert (
        "perplexity" in (out / "report.md").read_text()
        and "from_pretrained" in (out / "model" / "README.md").read_text()
    )


def _check_cache_bytes(cache):
    """What was measured is what the formula says, which goes on where measuring stopped."""
    assert {"128", "1024"} <= cache["teacher"].keys() == cache["student"].keys()
    assert cache["formula"]["teacher"].keys() == {"128", "1024", "8192", "32768"}
    for who in ("teacher", "student"):
        assert all(cache["formula"][who][length] == measured for length, measured in cache[who].items())


@pytest.mark.parametrize("to", ["mla", "gate-swa"])
def test_softmax_targets(teacher, text, tmp_path, to, capsys):
    """Calibrated, or one layer kept by measurement; the same report."""
    more = [] if to == "mla" else ["--set", "edit.keep=auto:3", "--set", "edit.window=16"]
    assert main(command(teacher, text, tmp_path / "run", *more, to=to)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    _check_cache_bytes(report["cache_bytes"])
    assert report["cache_bytes"]["student"]["1024"] < 0.52 * report["cache_bytes"]["teacher"]["1024"]
    assert "obstacle" in report["export"]["native"]
    assert "No architecture of transformers is this student" in (tmp_path / "run" / "report.md").read_text()
    if to == "gate-swa":
        ranking = report["layers"]["kl_when_edited_alone"]
        assert len(ranking) == 3 and report["layers"]["kept"] == [max(range(3), key=ranking.__getitem__)]
        assert json.loads((tmp_path / "run" / "layers.json").read_text()) == report["layers"]
        assert "cost most when edited alone" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    "to, settings", [("mla", ["edit.cache_budget=none"]), ("gate-swa", ["edit.window=5000", "edit.keep=none"])]
)
def test_an_exact_start_is_checked(teacher, text, tmp_path, to, settings):
    more = [part for setting in [*settings, "edit.exact=true"] for part in ("--set", setting)]
    assert main(command(teacher, text, tmp_path / "run", *more, to=to)) == 0
    handover = json.loads((tmp_path / "run" / "report.json").read_text())["handover"]
    assert (
        0 <= handover.get("max_abs_logit_float64", handover["max_abs_logit"]) <= handover["allowed"]
        and handover["max_abs_logit"] < 1e-3
    )


def test_a_start_that_is_not_exact_stops_the_run(teacher, text, tmp_path, capsys):
    assert (
        main(command(teacher, text, tmp_path / "run", "--set", "edit.exact=true", to="mla")) == 2
    )  # half of the cache is not all
    assert "must not change the function" in capsys.readouterr().err


def test_the_export_is_checked_in_a_clean_process(teacher, text, tmp_path, monkeypatch):
    from convert.exporting.verify import check_in_clean_process

    monkeypatch.setattr(shipping, "check_in_clean_process", check_in_clean_process)
    assert main(command(teacher, text, tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["export"]["max_abs_logit"] <= report["export"]["allowed"]


def test_a_run_folder_is_a_teacher(teacher, text, tmp_path):
    """linear -> mamba2 from the folder of a linear run; and evaluate_run() repeats the numbers."""
    assert main(command(teacher, text, tmp_path / "first", to="linear")) == 0
    assert main(command(tmp_path / "first", text, tmp_path / "second")) == 0
    assert [p.name for p in sorted((tmp_path / "second" / "steps").iterdir())] == [
        "0-handover",
        "1-forget",
        "2-distill",
    ]  # nothing to align
    again, report = (
        evaluation.evaluate_run(tmp_path / "second"),
        json.loads((tmp_path / "second" / "report.json").read_text()),
    )
    assert again["perplexity"]["teacher"] == pytest.approx(report["perplexity"]["teacher"], rel=1e-6)
    assert again["perplexity"]["student"] == pytest.approx(report["perplexity"]["student"], rel=1e-6)
    assert again["cache_bytes"]["student"] == report["cache_bytes"]["student"]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def killed_at(instant: str, arguments: list[str], monkeypatch) -> int:
    """Run the command in a forked process that kills itself, as by SIGKILL, at an instant; the signal it died of."""
    child = os.fork()
    if child == 0:
        die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if instant == "before a checkpoint's rename":
            monkeypatch.setattr(
                checkpoint.torch, "save", lambda state, file: (file.write(b"half"), file.flush(), die())
            )
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
            monkeypatch.setattr(shipping, "export", die)
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


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_and_repeated_is_bit_identical(instant, teacher, text, tmp_path, monkeypatch):
    every_step = ["--set", "align.save_every=0", "--set", "distill.save_every=0"]
    assert main(command(teacher, text, tmp_path / "straight", *every_step)) == 0
    arguments = command(teacher, text, tmp_path / "killed", *every_step)
    assert killed_at(instant, arguments, monkeypatch) == signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert main(arguments) == 0
    straight, resumed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == resumed.keys()
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("straight", "killed")]
    assert keys(reports[0]) == keys(reports[1])  # a resumed run tells the same, no more and no less
    left = [
        {str(file.relative_to(tmp_path / run)) for file in (tmp_path / run / "steps").rglob("*")}
        for run in ("straight", "killed")
    ]
    assert left[0] == left[1] and len([name for name in left[0] if name.endswith("student")]) == 1
    losses = [
        [json.loads(line)["train/loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "killed")
    ]
    assert losses[0] == losses[1]


def test_sigterm_saves_and_says_how_to_go_on(teacher, text, tmp_path, monkeypatch, capsys):
    log = conversion.Track.log
    monkeypatch.setattr(
        conversion.Track, "log", lambda self, *a: (log(self, *a), a[0] == 2 and os.kill(os.getpid(), signal.SIGTERM))
    )
    assert main(command(teacher, text, tmp_path / "run")) == 130
    assert "Stopped at step 2 of 3; it is saved. The same command goes on from there." in capsys.readouterr().err
    assert (tmp_path / "run" / "steps" / "1-align" / "checkpoint-2.pt").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # the caller's again


def test_a_finished_run_is_skipped_and_changed_settings_are_refused(teacher, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(teacher, text, out)) == 0
    before = (out / "steps" / "4-distill" / "DONE").stat().st_mtime_ns
    assert main(command(teacher, text, out)) == 0
    assert (out / "steps" / "4-distill" / "DONE").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(command(teacher, text, out, "--set", "distill.lr=0.5")) == 2
    error = capsys.readouterr().err
    assert "steps.distill.settings.lr: 0.002 -> 0.5" in error and "--fresh" in error
    assert main(command(teacher, text, out, "--set", "distill.lr=0.5", "--fresh")) == 0
    assert (tmp_path / "run.old-1" / "report.json").exists()


def test_an_out_that_belongs_to_something_else_is_refused(teacher, text, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        assert main(command(teacher, text, tmp_path / "thesis", *more)) == 2
        assert "Give another --out." in capsys.readouterr().err
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_damaged_checkpoint_is_set_aside(teacher, text, tmp_path, monkeypatch, capsys):
    every_step = ["--set", "distill.save_every=0"]
    assert main(command(teacher, text, tmp_path / "straight", *every_step)) == 0
    arguments = command(teacher, text, tmp_path / "run", *every_step)
    assert killed_at("after a checkpoint", arguments, monkeypatch) == signal.SIGKILL
    newest = tmp_path / "run" / "steps" / "4-distill" / "checkpoint-2.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(arguments) == 0
    assert "damaged" in capsys.readouterr().out
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name


def full(*_, **__):
    raise OSError(28, "No space left on device")


def full_in_rust(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_in_torch(*_, **__):
    raise RuntimeError(
        "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file write failed"
    )


WRITERS = {  # in the order in which a run writes
    "tokens": ("convert.data.text.np.save", full),
    "ledger": ("convert.runs.ledger.write_json", full),
    "metrics": ("convert.core.json_lines.append", full),
    "checkpoint": ("convert.runs.ledger.torch.save", full_in_torch),
    "student": ("convert.runs.ledger.save_model", full_in_rust),
    "answers": ("convert.evaluation.runner.lines.append", full),
    "evaluation": ("convert.evaluation.runner.write_json", full),
    "model": ("convert.exporting.hub.save_torch_state_dict", full_in_rust),
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


@pytest.mark.parametrize("out, data, words", [
    ("first", "text", "is the teacher"), ("first/next", "text", "lies inside the teacher"), ("text/new", "text", "lies inside the data"),
    ("first", "first/data.txt", "is the teacher"), ("holder", "holder/data", "holds the data"), ("holder", "link", "holds the data"),
])  # fmt: skip
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


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch, capsys):
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's storages are tagged
        folder.save(3, {"step": 3, "parameters": [torch.ones(4)]})
    assert folder.load()["parameters"][0].device.type == "cpu" and capsys.readouterr().out == ""
    file = folder.folder / "checkpoint-3.pt"
    torch.save({"code": Path("x")}, file)  # whole, and nothing that may be loaded
    file.with_suffix(".sha256").write_text(checkpoint.sha256(file))
    with pytest.raises(UserError, match="is what was written and cannot be read here"):
        folder.load()
    assert file.exists()


def test_a_full_disk_is_one_sentence(teacher, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.torch, "save", full)
    assert main(command(teacher, text, tmp_path / "run", "--set", "align.save_every=0")) == 2
    assert "Free some space; the same command goes on from the last one." in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("convert.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert main(command(teacher, text, tmp_path / "other")) == 2
    assert "1e+03 B free" in (error := capsys.readouterr().err) or "kB free" in error


def test_a_hand_over_that_is_not_exact_stops_the_run(teacher, text, tmp_path, monkeypatch, capsys):
    from convert.mixers import Mamba2

    start = Mamba2.from_projections.__func__

    def off(cls, projections, options):
        mixer = start(cls, projections, options)
        mixer.block.conv.weight.data[:, 0] = 0.01
        return mixer

    monkeypatch.setattr(Mamba2, "from_projections", classmethod(off))
    assert main(command(teacher, text, tmp_path / "run")) == 2
    assert "must not change the function, and it did" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--to", "mamba3"], "Unknown target 'mamba3'. Nearest: mamba"),
        (["--set", "distil.lr=1"], "this recipe's steps are linear, align, handover, forget, distill"),
        (["--set", "distill.speed=1"], "has no field 'speed'; it has"),
        (["--set", "distill.lr=fast"], "the value must be a number; got 'fast'"),
        (["--set", "distill.trains=norms"], "one of feature_maps, mixers, all_but_embeddings, everything"),
        (["--set", "align"], "--set takes STEP.FIELD=VALUE"),
        (["--set", "distill.lr=-1"], "lr must be within 0 .. 10"),
        (
            ["--set", "distill.seq_len=4096", "--set", "distill.batch_tokens=4096"],
            "must fit the teacher's 512 positions",
        ),
        (["--set", "distill.batch_tokens=100"], "a batch must be whole sequences"),
        (["--tokens", "many"], "A number of tokens is written 20000, 500k, 12M or 1B; got 'many'"),
        (["--set", "distill.noise=1.5"], "noise must be within 0 .. 1; got 1.5"),
        (["--set", "distill.loss_chunk=0"], "loss_chunk must be within 1 .."),
        (["--set", "distill.temperature=0"], "temperature must be within 0.01 .. 100; got 0"),
        (["--set", "distill.forward_kl=0"], "a loss needs a term"),
        (
            ["--set", "distill.objective=energy_mse"],
            "distill compares distributions; its objective cannot be energy_mse",
        ),
        (["--set", "handover.conv=0"], "conv must be within 1 .. 64; got 0"),
        (["--set", "forget.rate=-1"], "rate must be within 0 .. 10; got -1"),
        (["--seed", "-1"], "--seed must be within 0 .. 9.22337e+18; got -1"),
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
    monkeypatch.setattr(conversion, "load_teacher", None)
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(command(teacher, text, out)) == 2
        assert f"--out must be a folder; {tmp_path / 'file'} is a file." in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_one_process_at_a_time(teacher, text, tmp_path, capsys):
    arguments = command(teacher, text, tmp_path / "run", to="linear")
    assert main(arguments) == 0
    with checkpoint.locked(tmp_path / "run"):
        for more in ([], ["--fresh"]):
            assert main([*arguments, *more]) == 2
            assert "another one holds" in capsys.readouterr().err
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("DONE", "is damaged. Start again with --fresh"),
        ("student/model.safetensors", "are damaged"),
        ("student/config.json", "are damaged"),
    ],
)
def test_damaged_results_are_named(name, words, teacher, text, tmp_path, capsys):
    arguments = command(teacher, text, tmp_path / "run", to="linear")
    assert main(arguments) == 0
    file = tmp_path / "run" / "steps" / "2-distill" / name
    whole = bytearray(file.read_bytes())
    if file.suffix == ".safetensors":
        whole[-20] ^= 1  # one bit of a weight
    else:
        del whole[len(whole) // 2 :]
    file.write_bytes(whole)
    assert main(arguments) == 2
    assert words in (error := capsys.readouterr().err) and "defect" not in error


def test_a_damaged_result_is_named_wherever_it_is_read(tmp_path):
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    folder.folder.mkdir(parents=True)
    (folder.folder / "DONE").write_text("{")
    with pytest.raises(UserError, match="^The result .* is damaged. Start again with --fresh; "):
        folder.student(tiny_teacher("gpt_neox"))
    (tmp_path / "steps" / "1-align" / "student").mkdir(parents=True)
    (
        tmp_path / "steps" / "1-align" / "student" / "model.safetensors"
    ).touch()  # what the step starts from is still there
    with pytest.raises(
        UserError,
        match="^The result .* is damaged. Delete that file to do the step again, or start again with --fresh; ",
    ):
        folder.result()


def test_a_checkpoint_without_room_for_its_digest_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sha256", full)
    folder = checkpoint.StepFolder(tmp_path, 2, "distill")
    with pytest.raises(UserError, match="Free some space; the same command goes on from the last one."):
        folder.save(1, {"step": 1})
    assert list(folder.folder.iterdir()) == []


def test_another_teacher_under_the_same_name_is_refused(teacher, text, tmp_path, capsys):
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    assert main(command(mine, text, tmp_path / "run", to="linear")) == 0
    weights = load_file(mine / "model.safetensors")
    next(iter(weights.values())).add_(0.01)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    assert main(command(mine, text, tmp_path / "run", to="linear")) == 2
    assert "teacher_fingerprint" in capsys.readouterr().err


def test_space_counts_what_the_run_has_written(teacher, text, tmp_path, monkeypatch):
    from convert.planning.plan import Plan, check_space

    plan = Plan("t", "linear", "stdlib", "cpu", 0, 0, (), 1000, (), ())
    monkeypatch.setattr("convert.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 600})())
    (tmp_path / "run").mkdir()
    assert "needs about 1 kB more" in check_space(plan, tmp_path / "run")
    (tmp_path / "run" / "checkpoint").write_bytes(b"x" * 500)
    assert check_space(plan, tmp_path / "run") is None


def test_float64_decides_where_float32_is_too_coarse(teacher, text, tmp_path, monkeypatch):
    """A student whose rounding alone moves the logits too far passes; the planted error of the test above does not."""
    exactly = swaps._largest_change

    def rounded(head, before, after):
        worst, largest = exactly(head, before, after)
        return (worst, largest) if before.dtype == torch.float64 else (1.0, largest)

    monkeypatch.setattr(swaps, "_largest_change", rounded)
    assert main(command(teacher, text, tmp_path / "run")) == 0
    handover = json.loads((tmp_path / "run" / "report.json").read_text())["handover"]
    assert handover["max_abs_logit"] == 1.0 and handover["max_abs_logit_float64"] < 1e-9


def test_a_hand_over_copies_no_student(teacher, text, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the student was copied")

    monkeypatch.setattr(ConvertedForCausalLM, "__deepcopy__", refuse, raising=False)
    assert main(command(teacher, text, tmp_path / "run")) == 0


@pytest.mark.parametrize("name, given", [("neox-nano", "neox-nano"), ("mine", "mine"), ("mine", "~/mine")])
def test_only_a_local_teacher_is_remembered_by_its_place(name, given, teacher, text, tmp_path, monkeypatch, capsys):
    """An alias stays one, whatever folder of that name lies about."""

    def open_run(out, settings, fresh):
        raise UserError(f"it is {settings['teacher']}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(teacher, name)
    monkeypatch.setattr(conversion, "open_run", open_run)
    assert main(command(given, text, "out", to="linear")) == 2
    assert f"it is {tmp_path / 'mine' if name == 'mine' else name}\n" in capsys.readouterr().err


def test_functions_of_the_package_survive_its_commands():
    script = (
        "import convert.run, convert.evaluate, convert.generate\nfrom convert import evaluate_run, run_recipe\n"
        "assert (run_recipe.__module__, evaluate_run.__module__) == ('convert.pipeline', 'convert.evaluation.runner')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(conversion.__file__).parent.parent)


def wrong_logits(folder, ids, **_):
    return _load(folder)(ids, use_cache=False).logits.float() * 1.01


def no_process(folder, ids, **_):
    raise OSError("no more processes")


@pytest.mark.parametrize(
    "check, words", [(wrong_logits, "must give the same logits"), (no_process, "no more processes")]
)
def test_an_export_that_fails_its_check_is_not_called_model(check, words, teacher, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipping, "check_in_clean_process", check)
    assert main(command(teacher, text, tmp_path / "run", to="linear")) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "model.unchecked").exists()


def test_plan_trains_and_writes_nothing(teacher, text, tmp_path, capsys):
    assert main(command(teacher, text, tmp_path / "run", "--plan")) == 0
    printed = capsys.readouterr().out
    assert "distill" in printed and "assumes" in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert main(command(teacher, "/no/such/place", tmp_path / "run", "--plan")) == 2
    assert "There is no data at '/no/such/place'" in capsys.readouterr().err


def test_the_text_is_looked_for_once(teacher, text, tmp_path, monkeypatch):
    looked = []
    for module in (sys.modules["convert.run"], conversion):
        monkeypatch.setattr(module, "corpus", lambda spec: looked.append(spec) or corpus(spec))
    assert main(command(teacher, text, tmp_path / "run", to="linear")) == 0
    assert looked == [str(text)]


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
        cwd=Path(conversion.__file__).parent.parent,
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


@pytest.mark.parametrize(
    "text, expected", [("20000", 20_000), ("500k", 500_000), ("12M", 12_000_000), ("1.5B", 1_500_000_000)]
)
def test_numbers_of_tokens(text, expected):
    assert number_of_tokens(text) == expected


def test_a_budget_is_that_of_the_edited_layers(teacher, text, tmp_path):
    """Whatever layer is kept by measurement."""
    more = ["--set", "edit.keep=auto:3", "--set", "edit.cache_budget=0.5"]
    assert main(command(teacher, text, tmp_path / "run", *more, to="mla")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    layers = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["mixers"]
    (kept,) = report["layers"]["kept"]
    assert [i for i, mixer in enumerate(layers) if mixer is None] == [kept]
    used = sum(m["options"]["kv_rank"] + m["shape"]["num_kv_heads"] * m["options"]["rope_dim"] for m in layers if m)
    assert used <= 0.5 * 2 * 64  # of two layers with 64 numbers per token


def test_latent_attention_is_where_a_conversion_ends(teacher, text, tmp_path, capsys):
    assert main(command(teacher, text, tmp_path / "first", to="mla")) == 0
    capsys.readouterr()
    assert main(command(tmp_path / "first", text, tmp_path / "second")) == 2
    assert "Latent attention is where a conversion ends" in capsys.readouterr().err


BAD_EDITS = [
    ("gate-swa", "edit.keep=0,7", "kept layers must be within 0 .. 2"),
    ("gate-swa", "edit.keep=0,1,2", "not be all of them"),
    ("gate-swa", "edit.keep=auto:9", "one in 2 .. 3 can be kept; got one in 9"),
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
]


@pytest.mark.parametrize("to, setting, words", BAD_EDITS, ids=[setting for _, setting, _ in BAD_EDITS])
def test_edits_that_cannot_be_are_refused_before_anything_is_loaded(
    to, setting, words, teacher, text, tmp_path, capsys
):
    assert main(command(teacher, text, tmp_path / "run", "--set", setting, to=to)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
