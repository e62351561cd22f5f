"""Types and bounds beside fields and arguments: what fits passes, everything else is a sentence that says the rule."""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from convert import evaluate_run, load_teacher, recipes, run_recipe
from convert.core.errors import UserError
from convert.core.fields import Checked, Name, Place, Range, Text, broken, checked, shown
from convert.data.batches import Batches
from convert.data.corpus import corpus
from convert.data.text import Tokens, tokenize
from convert.evaluation.rules import Rule
from convert.exporting.hub import export
from convert.models.catalog import NANO, resolve
from convert.models.swap import swap
from tests.conftest import tiny_teacher

SHARE, SIZE = Annotated[float, Range(0, 1)], Annotated[int, Range(1, 64)]
FITS = [
    (SIZE, 1),
    (SIZE, 64),
    (SIZE | None, None),
    (SHARE, 0),
    (SHARE, 0.5),
    (bool, True),
    (Literal["a", "b"], "a"),
    (Name, "a-1.b_c"),
    (Text, "é \n"),
    (Place, "x"),
    (Place, Path("x")),
    (tuple[SIZE, ...], (1, 2)),
    (dict[str, int], {"a": 1}),
    (list[str] | str, ["a"]),
    (str, ""),
    (Sequence[int], range(3)),
    (Sequence[SIZE], [1, 2]),
    (Sequence[SIZE], (1,)),
    (Sequence[int], deque([1])),
    (SIZE, np.int64(3)),
    (SIZE, np.uint8(3)),
    (SHARE, np.float32(0.5)),
    (SHARE, np.float64(1)),
    (SHARE, np.int32(1)),
    (SHARE, Fraction(1, 2)),
    (tuple[SIZE, ...], (np.int64(1),)),
]
BREAKS = [
    (SIZE, 0, "within 1 .. 64"),
    (SIZE, 65, "within 1 .. 64"),
    (SIZE, True, "a whole number"),
    (SIZE, 1.0, "a whole number"),
    (SIZE, "1", "a whole number"),
    (SIZE | None, 0, "within 1 .. 64"),
    (SIZE, None, "a whole number"),
    (SHARE, math.nan, "a finite number"),
    (SHARE, math.inf, "a finite number"),
    (SHARE, 10**400, "within 0 .. 1"),
    (SHARE, False, "a finite number"),
    (bool, 1, "True or False"),
    (Literal["a", "b"], "c", "one of a, b"),
    (Literal["a"], [], "one of a"),
    (Name, "../../evil", "letters"),
    (Name, "", "letters"),
    (Name, "a" * 65, "letters"),
    (Text, "a\0", "NUL"),
    (Text, "", "1 to 4,096"),
    (Text, "\ud800", "UTF-8"),
    (Place, "a\0", "NUL"),
    (Place, "a\ud800", "in UTF-8"),
    (Place, "caf\udce9", "in UTF-8"),
    (Place, Path("caf\udce9"), "in UTF-8"),
    (Sequence[int], "12", "a sequence"),
    (Sequence[int], b"12", "a sequence"),
    (Sequence[SIZE], range(66), "within 1 .. 64"),
    (Sequence[int], {1: 2}, "a sequence"),
    (SIZE, np.int64(65), "within 1 .. 64"),
    (SIZE, np.float64(1), "a whole number"),
    (SIZE, np.bool_(True), "a whole number"),
    (SHARE, np.float32("nan"), "a finite number"),
    (SHARE, -math.inf, "a finite number"),
    (SHARE, 1j, "a finite number"),
    (Place, Path("a\0"), "NUL"),
    (Place, 5, "text or a path"),
    (tuple[SIZE, ...], [1], "a tuple, each a whole number"),
    (tuple[SIZE, ...], (0,), "within 1 .. 64"),
    (dict[str, int], {1: 1}, "a dictionary"),
    (Place, "a" * 5000, "4,096"),
]


@pytest.mark.parametrize("hint, value", FITS, ids=repr)
def test_what_fits(hint, value):
    assert broken(hint, value) is None


@pytest.mark.parametrize("hint, value, rule", BREAKS, ids=lambda part: repr(part)[:30])
def test_what_does_not_fit(hint, value, rule):
    assert rule in broken(hint, value)


def test_a_record_and_a_function_say_which_field_breaks_which_rule():
    @dataclasses.dataclass(frozen=True)
    class Record(Checked):
        size: SIZE = 1

    @checked
    def double(size: SIZE, *, again: bool = False) -> int:
        return 2 * size

    assert Record(3).size == 3 and double(4) == 8
    with pytest.raises(UserError, match=r"Record: size must be within 1 \.\. 64; got 0\."):
        Record(0)
    for wrong, words in (
        ((65,), "size must be within"),
        ((1, True), "too many positional"),
        ((), "missing a required"),
    ):
        with pytest.raises(UserError, match=words):
            double(*wrong)
    with pytest.raises(UserError, match=r"double\(\): again must be True or False; got 'no'"):
        double(1, again="no")


def test_numbers_of_numpy_become_pythons():
    @checked
    def kinds(a: int, b: Sequence[float], c: float = 0.5) -> list[type]:
        return [type(a), *map(type, b), type(c)]

    assert kinds(np.int64(1), [np.float32(1), 2]) == [int, float, int, float] and kinds(1, (), c=np.float32(1)) == [
        int,
        float,
    ]
    made = recipes.budget(
        "x", tiny_teacher("llama").config, tokens=np.int64(4096), seq_len=np.int32(64), seed=np.uint8(3)
    )
    kept = dataclasses.replace(SWAP, keep=(np.int64(1),))
    settings = dataclasses.replace(ALIGN.settings, lr=np.float32(0.5), tokens=made.tokens)
    plain = [kept.describe(), dataclasses.replace(ALIGN, settings=settings).describe(), made.seed]
    assert json.loads(json.dumps(plain))[0]["keep"] == [1]


def test_layers_may_be_a_range():
    assert [mixer and mixer["name"] for mixer in swap(tiny_teacher("llama"), "linear", layers=range(1)).config.mixers][
        :2
    ] == [
        "linear",
        None,
    ]


def test_any_value_can_be_shown():
    class Hostile:
        def __repr__(self):
            raise RuntimeError

    assert shown(torch.zeros(2, 2)) == "tensor([[0., 0.], [0., 0.]])"
    assert (
        shown(Hostile()) == "a Hostile"
        and shown(10**5000) == "a int"
        and len(shown("x" * 1000)) < 120
        and shown("\ud800") == r"'\ud800'"
    )


def budget(**changes):
    return recipes.Budget(
        **dict(
            tokens=2048,
            seq_len=64,
            batch_tokens=256,
            align_lr=1e-2,
            distill_lr=1e-3,
            objective=recipes.Objective.of("forward_kl"),
            micro_tokens=256,
        )
        | changes
    )


RECIPE = recipes.to_linear(budget())
SWAP, ALIGN, _ = RECIPE.steps
SOME = Tokens(torch.arange(500).numpy(), torch.zeros(1).numpy())
WRONG_CALLS = {
    "no device": lambda: run_recipe("neox-nano", RECIPE, device=None),
    "no recipe": lambda: run_recipe("neox-nano", None),
    "a number as teacher": lambda: run_recipe(5, RECIPE),
    "no out": lambda: run_recipe("neox-nano", RECIPE, ""),
    "NUL in out": lambda: run_recipe("neox-nano", RECIPE, "a\0b"),
    "another W&B": lambda: run_recipe("neox-nano", RECIPE, wandb="yes"),
    "a rule for rules": lambda: run_recipe("neox-nano", RECIPE, stop_when="generation<1"),
    "an unknown argument": lambda: run_recipe("neox-nano", RECIPE, tokens=5),
    "two steps of one name": lambda: dataclasses.replace(RECIPE, steps=(SWAP, ALIGN, ALIGN)),
    "no steps": lambda: dataclasses.replace(RECIPE, steps=()),
    "a step elsewhere": lambda: dataclasses.replace(SWAP, name="../../evil"),
    "minus one example": lambda: budget(examples=-1),
    "a list of steps": lambda: dataclasses.replace(RECIPE, steps=[SWAP]),
    "another mixer": lambda: dataclasses.replace(SWAP, mixer="rwkv"),
    "another mixer's options": lambda: dataclasses.replace(SWAP, mixer="mamba"),
    "calibration without end": lambda: dataclasses.replace(SWAP, calibration=10**9),
    "tokens without end": lambda: dataclasses.replace(ALIGN.settings, tokens=1e30),
    "a seed too large": lambda: dataclasses.replace(ALIGN.settings, seed=2**70),
    "a stage of no name": lambda: recipes.Train("align", "aligne", ALIGN.settings),
    "a rate of nan": lambda: recipes.SetDecay("forget", math.nan),
    "a weight as text": lambda: recipes.Objective((("1", recipes.Objective.of("forward_kl").terms[0][1]),)),
    "one in none": lambda: recipes.EveryNth(0),
    "no assignment": lambda: recipes.with_setting(RECIPE, None),
    "a hand-over to linear": lambda: recipes.to_mamba(budget(), "linear"),
    "no tokens": lambda: recipes.budget("x", tiny_teacher("llama").config, tokens=0),
    "a family that is none": lambda: swap(
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)), "linear"
    ),
    "a stage that is none": lambda: recipes.Train("align", print, ALIGN.settings),
    "a dtype by name": lambda: load_teacher("neox-nano", dtype="float32"),
    "a dtype of integers": lambda: load_teacher("neox-nano", dtype=torch.int8),
    "a number as data": lambda: corpus(5),
    "no tokenizer": lambda: tokenize(corpus("stdlib"), None),
    "sequences of none": lambda: Batches(SOME, 0, 1),
    "a list of tokens": lambda: Batches([1, 2], 1, 1),
    "a step before the first": lambda: Batches(SOME, 16, 1)(-1),
    "layer 99": lambda: swap(tiny_teacher("llama"), "mamba", layers=(99,)),
    "layer -1": lambda: swap(tiny_teacher("llama"), "mamba", layers=(-1,)),
    "statistics of no layer": lambda: swap(tiny_teacher("llama"), "mamba", stats=[]),
    "options as a dictionary": lambda: swap(tiny_teacher("llama"), "mamba", {"conv": 4}),
    "a teacher as student": lambda: export(tiny_teacher("llama"), None, "x", card=""),
    "a rule of nan": lambda: Rule.of("generation<nan", ("generation",)),
    "a rule of nothing": lambda: Rule.of(None, ("generation",)),
    "half a limit": lambda: evaluate_run("neox-nano", limit=0.5),
    "tasks in a list": lambda: evaluate_run("neox-nano", tasks=["names"]),
    "no tasks": lambda: evaluate_run("neox-nano", tasks=""),
}


@pytest.mark.parametrize("call", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_are_a_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\.$") as caught:
        call()
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_paths_are_places():
    assert resolve(NANO) == resolve(str(NANO)) and corpus(NANO / "README.md").files == (NANO / "README.md",)
