"""What is trained is chosen by module."""

import pytest

from convert.models.access import slots_of
from convert.models.swap import swap
from convert.training.selectors import SELECTORS, name_of, selected
from tests.conftest import tiny_teacher
from tests.training.stages import student_of


@pytest.mark.parametrize("select, expected", [("feature_maps", 12), ("mixers", 12 + 8 * 3 - 0), ("everything", None)])
def test_selectors_choose_by_module(select, expected):
    student = student_of("gpt_neox")
    chosen = SELECTORS[select](student)
    names = [n for n, p in student.named_parameters() if any(p is c for c in chosen)]
    if select == "feature_maps":
        assert len(chosen) == expected and all("feature_" in n for n in names)
    elif select == "mixers":
        assert all(".mixer." in n for n in names) and len(names) == sum(
            ".mixer." in n for n, _ in student.named_parameters()
        )
    else:
        assert len(chosen) == len(list(student.parameters()))


def test_kept_attention_can_be_left_out():
    student = swap(tiny_teacher("llama"), "kda", layers=(0, 2))
    chosen = {id(p) for p in SELECTORS["all_but_kept_attention"](student)}
    names = {name.removeprefix("host.model.") for name, p in student.named_parameters() if id(p) not in chosen}
    attention = {f"layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert names == attention | {"embed_tokens.weight", "host.lm_head.weight"}


def test_a_selector_is_named_or_a_function():
    student = student_of("gpt_neox")
    by_name, by_function = (list(selected(student, one)) for one in ("mixers", SELECTORS["mixers"]))
    assert all(a is b for a, b in zip(by_name, by_function, strict=True))
    assert name_of("mixers") == name_of(SELECTORS["mixers"]) == "mixers"


def test_a_plain_model_has_no_mixers():
    model = tiny_teacher("llama")
    assert slots_of(model) == {} and SELECTORS["mixers"](model) == []
    kept = {id(p) for p in SELECTORS["all_but_embeddings"](model)}
    frozen = [name for name, p in model.named_parameters() if id(p) not in kept]
    assert frozen == ["model.embed_tokens.weight", "lm_head.weight"]
