"""Whole runs: what they leave behind."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import load_teacher, pipeline, recipes, run_recipe
from convert.data.corpus import corpus
from convert.evaluation.runner import evaluate_run
from convert.exporting import verify
from convert.mixers import MIXERS
from convert.run import main
from convert.runs.checkpoint import StepFolder
from convert.steps import selection
from tests.conftest import logits_here
from tests.e2e.conftest import command


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
    assert {"tokens", "seconds", "loss_first", "loss_last", "headline_after"} <= report["stages"][0].keys()
    _check_cache_bytes(report["cache_bytes"])
    assert len(set(report["cache_bytes"]["student"].values())) == 1  # a state does not grow
    assert report["versions"]["torch"] == torch.__version__
    if target == "linear":
        assert report["handover"]["max_abs_logit"] is None
    else:
        assert (
            report["handover"]["max_abs_logit"] <= report["handover"]["allowed"]
            and report["handover"]["headline_change"] < 1e-4
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


def test_align_by_block_outputs(teacher, text, tmp_path):
    """With a term on attention outputs beside it, and a layer that keeps its attention."""
    objective = "block_l2_distance + 0.5*energy_mse"
    more = ["--set", f"align.objective={objective}", "--set", "edit.window=16", "--set", "edit.keep=1"]
    assert main(command(teacher, text, tmp_path / "run", *more, to="gate-swa")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["stages"][0]["loss_first"] > 0
    terms = report["settings"]["steps"][1]["settings"]["objective"]
    assert terms == recipes.Objective.of(objective).plain()
    assert next(s for s in report["settings"]["steps"] if s["name"] == "distill")["settings"]["objective"] != terms


@pytest.mark.parametrize("to", ["mla", "gate-swa"])
def test_softmax_targets(teacher, text, tmp_path, to, capsys):
    """Calibrated, or one layer kept by measurement; the same report."""
    more = [] if to == "mla" else ["--set", "edit.keep=auto:3", "--set", "edit.window=16"]
    assert main(command(teacher, text, tmp_path / "run", *more, to=to)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    _check_cache_bytes(report["cache_bytes"])
    assert report["cache_bytes"]["student"]["1024"] < 0.52 * report["cache_bytes"]["teacher"]["1024"]
    assert report["export"]["native"]["obstacle"]
    assert "No architecture of transformers is this student" in (tmp_path / "run" / "report.md").read_text()
    if to == "gate-swa":
        ranking = report["layers"]["kl_when_edited_alone"]
        assert len(ranking) == 3 and report["layers"]["kept"] == [max(range(3), key=ranking.__getitem__)]
        known = {name: value for name, value in report["layers"].items() if value is not None}
        assert json.loads((tmp_path / "run" / "layers.json").read_text()) == known
        assert "cost most when edited alone" in (tmp_path / "run" / "report.md").read_text()


def test_layers_chosen_after_alignment(teacher, text, tmp_path, monkeypatch):
    """A run that is killed when a ranking was measured chooses by that ranking: what it keeps is the
    teacher's own."""
    settings = ["--set", "select.every=2", "--set", "select.greedy=true"]
    arguments = command(teacher, text, tmp_path / "killed", *settings, to="hybrid-kda")
    if not (child := os.fork()):
        save = StepFolder.save
        monkeypatch.setattr(StepFolder, "save", lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL)))
        main(arguments)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (tmp_path / "killed" / "steps" / "2-select" / "checkpoint-1").exists()
    with monkeypatch.context() as patched:
        patched.setattr(selection, "kl_when_given_back", None)  # nothing is measured again
        assert main(arguments) == 0
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    (kept,), ranking = report["layers"]["kept"], report["layers"]["when_given_back"]
    assert ranking["order"] == [kept] == [min(range(3), key=ranking["alone"].__getitem__)]
    assert json.loads((tmp_path / "killed" / "layers.json").read_text()) == {"kept": [kept], "when_given_back": ranking}
    assert "chosen after all were replaced" in (tmp_path / "killed" / "report.md").read_text()
    config = json.loads((tmp_path / "killed" / "model" / "config.json").read_text())
    assert [i for i, spec in enumerate(config["mixers"]) if spec is None] == [kept]
    model = load_file(tmp_path / "killed" / "model" / "model.safetensors")
    own = {k: v for k, v in model.items() if f"layers.{kept}.attention." in k}
    expected = load_file(teacher / "model.safetensors")
    assert own and all(torch.equal(v, expected[k.removeprefix("host.")]) for k, v in own.items())


def test_the_export_is_checked_in_a_clean_process(teacher, text, tmp_path, monkeypatch):
    from convert.exporting.verify import check_in_clean_process

    monkeypatch.setattr(verify, "check_in_clean_process", check_in_clean_process)
    assert main(command(teacher, text, tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["export"]["max_abs_logit"] <= report["export"]["allowed"]


def test_a_run_folder_is_a_teacher(teacher, text, tmp_path):
    """linear -> mamba2 from the folder of a linear run; and evaluate_run() repeats the numbers."""
    assert main(command(teacher, text, tmp_path / "first", to="linear")) == 0
    assert main(command(tmp_path / "first", text, tmp_path / "second")) == 0
    # nothing to align
    assert [p.name for p in sorted((tmp_path / "second" / "steps").iterdir())] == [
        "0-handover",
        "1-forget",
        "2-distill",
    ]
    again, report = (
        evaluate_run(tmp_path / "second", limit=2),
        json.loads((tmp_path / "second" / "report.json").read_text()),
    )
    assert again.perplexity.teacher == pytest.approx(report["perplexity"]["teacher"], rel=1e-6)
    assert again.perplexity.student == pytest.approx(report["perplexity"]["student"], rel=1e-6)
    assert again.cache_bytes.student == report["cache_bytes"]["student"]


def test_functions_of_the_package_survive_its_commands():
    script = (
        "import convert.run, convert.evaluate, convert.generate\nfrom convert import evaluate_run, run_recipe\n"
        "assert (run_recipe.__module__, evaluate_run.__module__) == ('convert.pipeline', 'convert.evaluation.runner')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(pipeline.__file__).parent.parent)


def wrong_logits(folder, ids, **_):
    return logits_here(folder, ids) * 1.01


def no_process(folder, ids, **_):
    raise OSError("no more processes")


@pytest.mark.parametrize(
    "check, words", [(wrong_logits, "must give the same logits"), (no_process, "no more processes")]
)
def test_an_export_that_fails_its_check_is_not_called_model(check, words, teacher, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "check_in_clean_process", check)
    assert main(command(teacher, text, tmp_path / "run", to="linear")) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists() and (tmp_path / "run" / "model.unchecked").exists()


def test_the_text_is_looked_for_once(teacher, text, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("convert.domains.language.corpus", lambda spec: looked.append(spec) or corpus(spec))
    assert main(command(teacher, text, tmp_path / "run", to="linear")) == 0
    assert looked == [str(text)]


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


# --- what a training step may have for itself


def test_a_step_may_have_its_own_data_and_teacher(teacher, text, tmp_path, capsys, monkeypatch):
    """They are loaded for the step, and are part of what the ledger compares."""
    other, more = tmp_path / "other", tmp_path / "more"
    shutil.copytree(teacher, other)
    weights = load_file(other / "model.safetensors")
    for value in weights.values():
        value.mul_(1.1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(text, more)
    own = ["--set", f"distill.teacher={other}", "--set", f"distill.data={more}"]
    assert main(command(teacher, text, tmp_path / "plain", to="linear")) == 0
    assert main(command(teacher, text, tmp_path / "run", *own, to="linear")) == 0
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    step = ledger["steps"][-1]
    assert step["teacher"] == str(other) and step["data"] == str(more)
    assert step["teacher_fingerprint"] != ledger["teacher_fingerprint"]
    losses = [
        [json.loads(line)["train/loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("plain", "run")
    ]
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]  # align is the run's, distill is not
    monkeypatch.chdir(tmp_path)
    recipe = recipes.tiny(recipes.default_recipe(str(teacher), load_teacher(teacher).model.config, "linear"))
    assert pipeline.finished(tmp_path / "run", str(teacher), recipe, str(text)) is None
    for name in ("teacher=other", "data=more"):  # by another path, but the same
        recipe = recipes.with_setting(recipe, f"distill.{name}")
    assert pipeline.finished(tmp_path / "run", str(teacher), recipe, str(text)) is not None
    (more / "0.txt").write_text("another text. " * 50)
    assert main(command(teacher, text, tmp_path / "run", *own, to="linear")) == 2
    assert "steps.distill.data_fingerprint" in capsys.readouterr().err


def test_a_steps_own_teacher_has_the_runs_tokens(teacher, text, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(command(teacher, text, tmp_path / "run", "--set", f"distill.teacher={other}", to="linear")) == 2
    assert "different tokens for the same numbers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- students that are not a swap of one mixer


def test_a_student_from_scratch(teacher, text, tmp_path, monkeypatch):
    """It has projectors while it trains and none in its folder, which loads without code of ours."""
    sizes = ["--set", "build.layers=2", "--set", "build.width=24", "--set", "build.heads=2", "--set", "build.inner=48"]
    assert main(command(teacher, text, tmp_path / "run", *sizes, to="scratch")) == 0
    folder = tmp_path / "run" / "model"
    assert not list(folder.glob("*.py")) and json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [step["kind"] for step in report["steps"]] == ["Build", "Train"] and report["handover"]["tokens"] is None
    assert load_teacher(tmp_path / "run").model.config.num_hidden_layers == 2
    assert main(command(tmp_path / "run", text, tmp_path / "again", to="linear")) == 0  # a teacher like any other


def test_two_swaps_make_a_hybrid_of_two_mixers(teacher, text, tmp_path):
    """Layer 0 is a window, layer 1 Mamba-2 by way of linear attention, layer 2 keeps its attention."""
    budget = recipes.Budget(768, 64, 128, 1e-3, 1e-3, recipes.Objective.of("forward_kl"), 128, examples=2)
    swap, align, distill = recipes.to_linear(budget).steps
    steps = (
        recipes.Swap("window", "gate-swa", MIXERS["gate-swa"].Options(window=16), layers=(0,)),
        dataclasses.replace(swap, layers=(1,)),
        align,
        recipes.Swap("handover", "mamba2", MIXERS["mamba2"].Options(), exact=True, layers=(1,)),
        recipes.SetDecay("decay", 1e-3),
        distill,
    )
    report = run_recipe(teacher, recipes.Recipe("hybrid", steps, 2), tmp_path / "run", data=text, wandb="disabled")
    names = [
        mixer and mixer["name"]
        for mixer in json.loads((tmp_path / "run" / "model" / "config.json").read_text())["mixers"]
    ]
    assert names == ["gate-swa", "mamba2", None] and report.layers.kept == [2]
    assert report.handover.max_abs_logit <= report.handover.allowed and list(report.half_lives) == ["1"]
