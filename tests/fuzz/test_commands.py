"""Command lines: options with values of every wrong kind."""

import importlib

import pytest
from hypothesis import strategies as st

from convert import pipeline as conversion
from convert.cli import fail_in_words
from convert.evaluate import main as evaluate
from convert.generate import main as generate
from convert.models.catalog import NANO
from convert.recipes.targets import TARGETS
from convert.run import main as run
from tests.fuzz import NUMBERS, TEXTS, TIMES, Reached, behaves, contents, fuzz


def reached(*args, **kwargs):
    raise Reached


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """An empty folder to work in, with some text; nothing trains and nothing is asked there."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "words.txt").write_text("some words to read. " * 5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CONVERT_CACHE", str(folder / "cache"))
        patch.setattr(conversion, "_locked_run", reached)
        patch.setattr("convert.evaluation.runner.evaluate_tasks", reached)
        patch.setattr("convert.models.loading.is_hub_reachable", lambda: False)
        yield folder


FIELDS = [
    "lr",
    "tokens",
    "keep",
    "exact",
    "window",
    "sinks",
    "gate",
    "shape",
    "kv_rank",
    "rope_dim",
    "q_rank",
    "cache_budget",
    "start",
    "calibration",
    "seq_len",
    "batch_tokens",
    "micro_tokens",
    "seed",
    "schedule",
    "warmup",
    "decay",
    "precision",
    "noise",
    "loss_chunk",
    "evaluate_every",
    "save_every",
    "objective",
    "trains",
    "cross_entropy",
    "forward_kl",
    "temperature",
    "feature_matching",
    "taid",
    "hidden_projection",
    "t_start",
    "conv",
    "dt_rank",
    "rate",
    "name",
    "options",
    "stage",
    "",
]
STEPS = st.sampled_from(["linear", "align", "handover", "forget", "distill", "edit", "", "x", "0"])
VALUES = st.one_of(
    TEXTS,
    st.sampled_from(
        [
            "none",
            "true",
            "every:2",
            "auto",
            "auto:3",
            "auto:-1",
            "every:",
            "0,1",
            "0,0",
            "exact",
            "native",
            "svd",
            "random",
            "everything",
            "0.9*forward_kl(temperature=2) + 0.1*cross_entropy",
            "taid(t_start=0.2) + 0.1*hidden_projection",
            "supervised",
        ]
    ),
)
SETTING = st.one_of(st.builds("{}.{}={}".format, STEPS, st.sampled_from(FIELDS), VALUES), TEXTS)
OPTION = st.one_of(
    st.tuples(st.sampled_from(["--tokens", "--seq-len", "--batch-tokens", "--seed"]), NUMBERS),
    st.tuples(st.sampled_from(["--data", "--device", "--wandb", "--stop-when", "--out"]), TEXTS),
    st.tuples(
        st.just("--stop-when"),
        st.builds("{}{}{}".format, st.sampled_from(["generation", "perplexity", "x"]), st.sampled_from("<>="), NUMBERS),
    ),
    st.tuples(st.just("--set"), SETTING),
    st.sampled_from([("--tiny",), ("--fresh",), ("--nonsense",), ("--trust-remote-code",)]),
)
TEACHER = st.one_of(st.just("neox-nano"), st.just("neox-nano"), TEXTS)
TARGET = st.one_of(st.sampled_from(list(TARGETS)), TEXTS)


@fuzz(
    60, teacher=TEACHER, target=st.one_of(st.sampled_from(list(TARGETS)), TARGET), options=st.lists(OPTION, max_size=4)
)
def test_plans(teacher, target, options):
    behaves(
        run,
        [teacher, "--to", target, "--data", "words.txt", *(word for option in options for word in option), "--plan"],
    )


@fuzz(12, target=st.sampled_from(list(TARGETS)), options=st.lists(OPTION, max_size=3))
def test_runs(target, options, place):
    before = contents(NANO), (place / "words.txt").read_bytes()
    behaves(
        run,
        [
            "neox-nano",
            "--to",
            target,
            "--tiny",
            "--data",
            "words.txt",
            "--wandb",
            "disabled",
            *(word for option in options for word in option),
        ],
    )
    assert before == (contents(NANO), (place / "words.txt").read_bytes())


ASKING = st.one_of(
    st.tuples(st.just("--limit"), NUMBERS),
    st.tuples(st.sampled_from(["--tasks", "--device", "--out", *["--lm-eval"] * bool(TIMES)]), TEXTS),
)


@fuzz(20, folder=TEACHER, options=st.lists(ASKING, max_size=3))
def test_evaluations(folder, options):
    behaves(evaluate, [folder, *(word for option in options for word in option)])


WRITING = st.one_of(
    st.tuples(st.sampled_from(["--temperature", "--seed"]), NUMBERS),
    st.tuples(st.just("--device"), TEXTS),
    st.just(("--raw",)),
)


@fuzz(
    20,
    folder=TEACHER,
    prompt=TEXTS,
    length=st.sampled_from(["1", "2", "0", "-1", "x", "1e3", "٣"]),
    options=st.lists(WRITING, max_size=2),
)
def test_generations(folder, prompt, length, options):
    behaves(generate, [folder, prompt, "--max-new-tokens", length, *(word for option in options for word in option)])


GRID = ["--teacher", "--tokens", "--seeds", "--limit", "--only", "--data", "--out"]
EXPERIMENTS = {  # name -> options with a value, and what takes long there
    "generation_throughput": (["--tasks", "--limit"], ["answer"]),
    "attention_editing": (["--tokens", "--seq-len", "--seeds", "--data", "--only", "--out"], ["report_of", "show"]),
    "compare": (["--out"], []),
    "gendistill_axes": (GRID, ["run_command"]),
    "hybrids": (GRID, ["run_command"]),
    "context": (["--lengths", "--minutes", "--needle-lengths", "--needles"], ["all_costs"]),
    "dashboards": (["--entity", "--project"], ["is_reachable"]),
    "hedgemamba_ablation": (["--teacher", "--mixer", "--tokens", "--seeds", "--out"], ["train"]),
    "mad": (["--mixers", "--tasks", "--seed", "--device", "--out"], ["ProcessPoolExecutor"]),
    "memory": (["--mixer"], ["in_a_process", "measure", "pythia"]),
    "perplexity_lies": (["--teacher", "--seeds", "--limit", "--out"], ["report_of", "show"]),
    "pretrain_nano": (["--out", "--tokens"], ["train_tokenizer"]),
    "lm_eval_parity": (["--tasks", "--limit", "--out"], ["compare"]),
    "speed": (["--teacher", "--steps", "--profile"], ["where", "speeds"]),
    "sweep": (["--to", "--tokens", "--data", "--trials", "--seed", "--out"], ["trial", "online"]),
}


@st.composite
def experiment(draw):
    name = draw(st.sampled_from(sorted(EXPERIMENTS)))
    flags = draw(st.lists(st.sampled_from(EXPERIMENTS[name][0]), max_size=3, unique=True))
    words = [word for flag in flags for word in (flag, draw(TEXTS))]
    return name, draw(st.lists(st.one_of(TEXTS, st.sampled_from(["neox-nano", "depth", "head"])), max_size=2)) + words


@fuzz(25, command=experiment())
def test_experiments(command):
    name, argv = command
    module = importlib.import_module(f"experiments.{name}")
    with pytest.MonkeyPatch.context() as patch:
        for slow in EXPERIMENTS[name][1]:
            patch.setattr(module, slow, reached)
        behaves(lambda: fail_in_words(module.main, debug=False), argv, f"experiments.{name}")
