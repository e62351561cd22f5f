"""A stranger's model folder: damaged, senseless and hostile files in it."""

import json
import os
import shutil

import pytest
from hypothesis import strategies as st

from convert import pipeline as conversion
from convert.generate import main as generate
from convert.models.catalog import NANO
from convert.run import main as run
from tests.conftest import tiny_teacher
from tests.fuzz import SEED, behaves, contents, damaged, fuzz, mutated
from tests.fuzz.test_commands import reached
from tests.models.conftest import write_tokenizer

FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "words.txt").write_text("some words to read. " * 3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVERT_CACHE", str(folder / "cache"))
        patch.setattr(conversion, "_locked_run", reached)
        yield folder


@pytest.fixture(scope="module")
def teachers(place, finished_run):
    """Of one family each: the embedded one, small ones, and a student."""
    folders = {"nano": NANO, "student": finished_run / "model"}
    for family in ("llama", "qwen3", "mistral"):
        folders[family] = place / family
        tiny_teacher(family).save_pretrained(folders[family])
        write_tokenizer(folders[family])
    return folders


def copied(teachers, name, place):
    teacher = place / "teacher"
    shutil.rmtree(teacher, ignore_errors=True)
    shutil.copytree(teachers[name], teacher)
    return teacher


def loads(teacher, place, plan):
    before = contents(teacher)
    shutil.rmtree(place / "out", ignore_errors=True)
    words = [str(teacher), "--to", "mamba2", "--tiny", "--data", "words.txt", "--out", "out", "--wandb", "disabled"]
    behaves(run, words + ["--plan"] * plan)
    assert contents(teacher) == before


@fuzz(
    20,
    name=st.sampled_from(["nano", "llama", "qwen3", "mistral", "student"]),
    file=st.sampled_from(FILES),
    seed=SEED,
    plan=st.booleans(),
)
def test_senseless_values(name, file, seed, plan, teachers, place):
    teacher = copied(teachers, name, place)
    good = json.loads((teacher / file).read_text()) if (teacher / file).exists() else {}
    (teacher / file).write_text(json.dumps(mutated(good, seed)))
    loads(teacher, place, plan and file == "config.json")


@fuzz(
    20, name=st.sampled_from(["nano", "student", "llama"]), file=st.sampled_from([*FILES, "tokenizer.json"]), seed=SEED
)
def test_damaged_files(name, file, seed, teachers, place):
    teacher = copied(teachers, name, place)
    good = (teacher / file).read_bytes() if (teacher / file).exists() else b"{}"
    (teacher / file).write_bytes(damaged(good, seed))
    loads(teacher, place, False)


@fuzz(8, seed=SEED)
def test_damaged_weights(seed, teachers, place):
    teacher = copied(teachers, "llama", place)
    good = (teacher / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(good[:8], "little")
    (teacher / "model.safetensors").write_bytes(damaged(good[:head], seed) + good[head:])
    loads(teacher, place, False)


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json", "model.safetensors", "special_tokens_map.json"])
def test_a_pipe_is_refused_at_once(file, teachers, place):
    teacher = copied(teachers, "nano", place)
    (teacher / file).unlink(missing_ok=True)
    os.mkfifo(teacher / file)
    for main, more in ((run, ["--to", "mamba2", "--plan", "--data", "words.txt"]), (generate, ["x"])):
        assert behaves(main, [str(teacher), *more])[0] == 2
