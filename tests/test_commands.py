"""The commands answer at once where no model is needed: what they import is counted, not the seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "wandb", "matplotlib", "pydantic", "numpy", "huggingface_hub", "jinja2")
NOT_FOR_A_PLAN = ("wandb", "matplotlib", "pydantic", "lm_eval", "datasets", "convert.pipeline", "convert.reports.page")

SCRIPT = """
import importlib, json, sys
command, *argv = sys.argv[1:]
try:
    code = importlib.import_module(f"convert.{command}").main(argv)
except SystemExit as stop:  # --help
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]))
"""


def modules_of(command: str, argv: list[str], place: Path) -> tuple[int, str, set[str]]:
    """The exit code of a command in a process of its own, what it says of errors, and all modules it imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CONVERT_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, command, *argv], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, done.stderr, set(modules)


TO = ["neox-nano", "--to", "mamba2"]
LIGHT = {
    "help": ("run", ["--help"], 0, ""),
    "help of evaluate": ("evaluate", ["--help"], 0, ""),
    "help of generate": ("generate", ["--help"], 0, ""),
    "help of export": ("export", ["--help"], 0, ""),
    "help of teach": ("teach", ["--help"], 0, ""),
    "an unknown teacher to record": ("teach", ["neox-nan"], 2, "Unknown teacher 'neox-nan'. Nearest: neox-nano"),
    "a classifier to record": ("teach", ["vit-nano"], 2, "A target must fit its teacher"),
    "text as an ONNX file": ("export", ["neox-nano", "--format", "onnx"], 2, "made of image classifiers"),
    "a wrong option": ("run", [*TO, "--sets"], 2, "Unrecognized arguments: --sets."),
    "no target": ("run", ["neox-nano"], 2, "required: --to"),
    "no number of tokens": ("run", [*TO, "--tokens", "abc"], 2, "A number of tokens is written"),
    "too short a sequence": ("run", [*TO, "--seq-len", "1"], 2, "--seq-len must be a whole number within 2"),
    "an unknown teacher": ("run", ["neox-nan", "--to", "mamba"], 2, "Unknown teacher 'neox-nan'. Nearest: neox-nano"),
    "an unknown target": ("run", ["neox-nano", "--to", "mamba3"], 2, "Unknown target 'mamba3'. Nearest: mamba"),
    "no such data": ("run", [*TO, "--data", "nowhere"], 2, "There is no data at 'nowhere'"),
    "no assignment": ("run", [*TO, "--set", "distill.lr"], 2, "--set takes STEP.FIELD=VALUE; got 'distill.lr'."),
    "sizes of --tiny": ("run", [*TO, "--tiny", "--tokens", "1k"], 2, "--tiny chooses the sizes itself"),
    "an unknown teacher to generate": ("generate", ["neox", "x"], 2, "Unknown teacher 'neox'"),
    "a classifier to generate": ("generate", ["vit-nano", "x"], 2, "vit-nano is an image classifier"),
    "no prompt": ("generate", ["neox-nano", ""], 2, "The prompt must not be empty"),
}


@pytest.mark.parametrize("command, argv, code, words", LIGHT.values(), ids=LIGHT)
def test_what_needs_no_model_imports_none(command, argv, code, words, tmp_path):
    ended, said, modules = modules_of(command, argv, tmp_path)
    assert (ended, not said) == (code, code == 0) and words in said
    assert not modules & set(HEAVY)


def test_a_plan_imports_only_what_it_plans_with(tmp_path):
    ended, said, modules = modules_of("run", ["pythia-70m", "--to", "mla", "--plan"], tmp_path)
    assert ended == 0, said
    assert not modules & set(NOT_FOR_A_PLAN)


def test_import_convert_imports_nothing_large():
    script = "import sys, convert; from convert import recipes; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)
