"""Whole runs on images, from a tiny classifier of digits."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from convert.domains import domain_of
from convert.evaluation import efficiency
from convert.exporting import images as exporting
from convert.models.catalog import resolve
from convert.models.vision.features import logits
from convert.models.vision.loading import load_teacher
from convert.pipeline import finished
from convert.reports import charts
from convert.run import main
from convert.runs import records
from tests.e2e.test_resume import killed_at
from tests.evaluation.classifiers import classifier
from tests.models.vision.small_models import small_model, timm_folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a tiny ViT that has ten classes."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    classifier("vit", classes=10).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, request):
    """The export is read back here: a clean process takes seconds, and tests of the export have one. One test draws the
    charts of its pages, which take long."""
    if request.function is not test_any_architecture_teaches_any:
        monkeypatch.setattr(charts, "_svg", lambda *_: charts.Markup("<svg></svg>"))
    monkeypatch.setattr(exporting, "verify", lambda *_: {"max_abs_logit": 0.0, "allowed": 1e-4})
    monkeypatch.setattr(efficiency, "_pass_seconds", lambda *_: 1e-3)


def command(teacher, out, *more, to="resnet-nano"):
    always = ["--data", "digits", "--tiny", "--wandb", "disabled", "--device", "cpu"]
    return [str(teacher), "--to", to, "--out", str(out), *always, *more]


@pytest.mark.parametrize("student", ["resnet-nano", "vmamba"])
def test_any_architecture_teaches_any(student, digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(digits, out, "--set", "distill.evaluate_every=16", to=student)) == 0
    report = records.report(out)
    assert (report.domain, report.unit, report.headline.name) == ("vision", "images", "error")
    assert [step.kind for step in report.steps] == ["Build", "TrainImages"] and report.tokens.total == 48
    assert report.similarity.before is not None and report.in_training.last_after == 48
    assert report.images.held_out == 500 and report.images.class_names == [str(i) for i in range(10)]
    assert [row["held_out/error"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())][
        -1
    ] == pytest.approx(report.headline.student)
    assert "top-1 accuracy" in (out / "report.md").read_text() and (out / "report.html").exists()
    found = AutoModelForImageClassification.from_pretrained(out / "model", trust_remote_code=student == "vmamba")
    again = load_teacher(resolve(str(out)))  # the student is a teacher like any other
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(logits(found.eval(), images), logits(again.model, images))
    assert domain_of(str(out)).name == "vision"
    before = (out / "report.json").read_bytes()
    assert main(command(digits, out, "--set", "distill.evaluate_every=16", to=student)) == 0
    assert "distill: done, skipped" in capsys.readouterr().out and before


def test_a_vmamba_is_squeezed_to_a_low_rank(digits, tmp_path, capsys):
    teacher, squeezed = tmp_path / "teacher", tmp_path / "squeezed"
    small_model("vmamba", channels=1, classes=10, side=16).save_pretrained(teacher)
    assert main(command(teacher, squeezed, "--set", "lowrank.ratio=0.5", to="vmamba-lowrank")) == 0
    report = records.report(squeezed)
    assert [step.kind for step in report.steps] == ["Factorise", "TrainImages"]
    assert report.cost.student.parameters < 0.7 * report.cost.teacher.parameters
    capsys.readouterr()
    for source, setting, words in (
        (teacher, "lowrank.rank=3", "have rank 2, and the student's would have 3"),
        (squeezed, "lowrank.ratio=0.6", "keeps 0.5 of its numbers; the ratio is 0.6"),
        (squeezed, "lowrank.rank=2", "have rank 1, and the student's would have 2"),
        (teacher, "lowrank.ratio=1.5", "ratio must be within 0.01 .. 1"),
        (digits, "lowrank.ratio=0.5", "this teacher is a vit. Convert it --to vmamba first"),
    ):
        assert main(command(source, tmp_path / "out", "--set", setting, to="vmamba-lowrank")) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_attention_of_a_vit_becomes_ss2d_and_a_killed_run_goes_on(digits, tmp_path, monkeypatch, capsys):
    more = ["--set", "swap.state_size=4", "--set", "align.save_every=0", "--set", "align.mixup=0.2"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert main(command(digits, tmp_path / "planned", *more, "--plan", to="vit-ss2d")) == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert "inner width 16, 4 states" in planned and "align: energy_mse, trains mixers" in planned
    assert not (tmp_path / "planned").exists()
    assert main(command(digits, straight, *more, to="vit-ss2d")) == 0
    report = records.report(straight)
    kinds = [("swap", "SwapSS2D"), ("align", "TrainImages"), ("distill", "TrainImages")]
    assert [(step.name, step.kind) for step in report.steps] == kinds
    assert [step.tokens for step in report.steps] == [0, 48, 48] and report.steps[1].loss_last is not None
    assert records.report(straight).settings.steps[1]["stage"] == "align"
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert all(row["gradients/layer_02"] > 0 for row in rows if "gradients/layer_00" in row)
    arguments = command(digits, killed, *more, to="vit-ss2d")
    assert killed_at("after a checkpoint", arguments, monkeypatch) == signal.SIGKILL
    assert not (killed / "steps" / "1-align" / "DONE").exists()
    assert main(arguments) == 0
    whole, resumed = (load_file(run / "model" / "model.safetensors") for run in (straight, killed))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    teacher = load_teacher(resolve(str(straight)))  # the student is a teacher like any other
    assert teacher.model.config.model_type == "vit_ss2d" and not any("q_proj" in name for name in whole)


NOT_SWAPPED = {
    "a CNN": ("resnet-nano", [], "this teacher is a resnet. Take --to vmamba"),
    "an MLP-Mixer": ("mixer-nano", [], "this teacher is a mlp_mixer. Take --to vmamba"),
    "a setting": ("vit-nano", ["--set", "swap.state_size=0"], "state_size must be within 1 .. 256"),
    "a term": ("vit-nano", ["--set", "align.objective=cross_entropy"], "align compares attention outputs and block"),
    "nothing compared": ("vit-nano", ["--set", "align.trains=mlps"], "mlps has nothing of it. Set trains=mixers"),
    "no images": ("vit-nano", ["--set", "align.images=0"], "every step needs images; it has 0"),
}


@pytest.mark.parametrize("teacher, more, words", NOT_SWAPPED.values(), ids=NOT_SWAPPED)
def test_attention_that_cannot_be_replaced_is_refused(teacher, more, words, tmp_path, capsys):
    arguments = command(teacher, tmp_path / "out", *more, to="vit-ss2d")
    arguments.remove("--tiny")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stopped; the first test that needs it makes it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.mark.parametrize("instant", ["before a checkpoint's rename", "after a checkpoint", "in the export"])
def test_a_run_that_was_killed_is_bit_identical(instant, digits, straight, tmp_path, monkeypatch):
    more = ["--set", "distill.save_every=0", "--set", "distill.mixup=0.2"]
    if not straight.exists():
        assert main(command(digits, straight, *more)) == 0
    arguments = command(digits, tmp_path / "killed", *more)
    assert killed_at(instant, arguments, monkeypatch) == signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert main(arguments) == 0
    whole, resumed = (load_file(run / "model" / "model.safetensors") for run in (straight, tmp_path / "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


REFUSED = {
    "text's tokens": (["--tokens", "20k"], "--tokens is an option of text, and resnet-nano learns from images"),
    "text's sequences": (["--seq-len", "64"], "Those of images are --images, --labels"),
    "tasks": (["--tasks", "names"], "--tasks chooses what a language model is asked"),
    "labels": (["--set", "distill.labels=0.001"], "0.001"),
    "another term": (["--set", "distill.objective=energy_mse"], "its objective cannot be energy_mse"),
    "one alone": (["--set", "distill.micro_images=5"], "leaves one alone"),
    "stages that are not there": (["--set", "distill.objective=hints(stage=9)"], "stage"),
    "a rule": (["--stop-when", "perplexity<2", "--set", "distill.evaluate_every=16"], "--stop-when takes error"),
    "words": (["--data", "stdlib"], "Images cannot be made of the text 'stdlib'"),
    "size": (["--set", "build.image_size=3"], "image_size must be"),
}


@pytest.mark.parametrize("more, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(more, words, digits, tmp_path, capsys):
    arguments = command(digits, tmp_path / "out", *more)
    if more[0] in ("--tokens", "--seq-len"):
        arguments.remove("--tiny")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_images_and_text_are_not_mixed(digits, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(digits, out, to="mamba")) == 2
    assert "this one is for language models, and" in capsys.readouterr().err
    assert main(["neox-nano", "--to", "resnet-nano", "--out", str(out)]) == 2
    assert "this one is for image classifiers, and neox-nano" in capsys.readouterr().err
    assert main(["neox-nano", "--to", "mamba", "--labels", "0.1", "--out", str(out)]) == 2
    assert "--labels is an option of images, and mamba learns from text" in capsys.readouterr().err
    assert not out.exists()


def test_a_teacher_that_guesses_is_told(digits, tmp_path, capsys):
    assert main(command(digits, tmp_path / "out")) == 0
    assert "Its classes must be those of the data, in the same order." in " ".join(capsys.readouterr().out.split())
    assert main(command("vit-nano", tmp_path / "known")) == 0
    assert "Its classes must be" not in capsys.readouterr().out


def test_classes_that_are_not_the_teachers_are_refused(tmp_path, capsys):
    classifier("vit", classes=7).save_pretrained(tmp_path / "seven")
    assert main(command(tmp_path / "seven", tmp_path / "out")) == 2
    assert "digits has 10, and seven 7" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_timm_teaches_and_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    timm_folder(tmp_path / "teacher")
    objective = "cross_entropy + one_for_all + hints + attention_transfer + relational"
    more = ["--set", "distill.save_every=0", "--set", f"distill.objective={objective}"]
    assert main(command(tmp_path / "teacher", tmp_path / "planned", *more, "--plan")) == 0
    assert "distill" in capsys.readouterr().out and not (tmp_path / "planned").exists()
    assert main(command(tmp_path / "teacher", tmp_path / "straight", *more)) == 0
    arguments = command(tmp_path / "teacher", tmp_path / "killed", *more)
    assert killed_at("after a checkpoint", arguments, monkeypatch) == signal.SIGKILL
    assert main(arguments) == 0
    whole, resumed = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("straight", "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    report = records.report(tmp_path / "killed")
    assert report.cost.teacher.macs > 0 and len(report.similarity.after.values) == 8  # layers of the teacher
    seven = timm_folder(tmp_path / "seven", classes=7)
    assert seven.num_classes == 7 and main(command(tmp_path / "seven", tmp_path / "out")) == 2
    assert "digits has 10, and seven 7" in capsys.readouterr().err


def test_a_finished_run_is_known(digits, tmp_path):
    from convert.recipes import tiny
    from convert.recipes.targets import default_recipe

    out = tmp_path / "run"
    assert main(command(digits, out)) == 0
    config = domain_of(str(digits)).read_config(resolve(str(digits)))
    recipe = tiny(default_recipe("tiny", config, "resnet-nano"))
    assert finished(out, str(digits), recipe, "digits") is not None
    assert finished(out, str(digits), tiny(default_recipe("tiny", config, "resnet-nano", labels=0.5)), "digits") is None
    shutil.rmtree(out)
