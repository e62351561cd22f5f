"""What is trained is chosen by module."""

import dataclasses

import pytest

from convert.core.errors import UserError
from convert.models.access import slots_of
from convert.models.swap import swap
from convert.training.selectors import SELECTORS, name_of, selected
from tests.conftest import FAMILIES, tiny_teacher
from tests.training.stages import SETTINGS, student_of


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_are_all_of_a_hybrid_and_share_nothing_but_tied_embeddings(family, tied):
    student = swap(tiny_teacher(family, tie_word_embeddings=tied), "kda", layers=(0, 2))
    parts = {
        part: {id(p) for p in SELECTORS[part](student)}
        for part in ("mixers", "kept_attention", "mlps", "norms", "head")
    }
    parts["embeddings"] = {id(p) for p in SELECTORS["embeddings"](student)} - (parts["head"] if tied else set())
    assert all(parts.values()) if not tied else not parts["embeddings"]
    assert sum(map(len, parts.values())) == len(list(student.parameters()))
    assert set.union(*parts.values()) == {id(p) for p in student.parameters()}
    normed = {id(p) for m in student.modules() if type(m).__name__.endswith("Norm") for p in m.parameters()}
    assert parts["norms"] == normed - parts["mixers"] - parts["kept_attention"]


def test_parts_are_added_and_subtracted_from_left_to_right():
    student = swap(tiny_teacher("llama"), "kda", layers=(0, 2))

    def chosen(trains):
        return {id(p) for p in selected(student, trains)}

    mlps, norms, mixers = map(chosen, ("mlps", "norms", "mixers"))
    assert chosen("mixers + norms") == chosen("norms+mixers") == norms | mixers
    assert chosen("all_but_kept_attention - mlps-norms") == mixers
    assert chosen("mlps - mlps + norms") == norms and not chosen("norms + mlps - norms - mlps")
    assert chosen("all_but_kept_attention") == mlps | norms | mixers
    assert name_of("  everything-head -  mlps") == "everything - head - mlps"


@pytest.mark.parametrize("trains", ["", "mlp", "- mlps", "mlps -", "mlps norms", "mlps * norms", "mlps -- norms"])
def test_expressions_that_cannot_be_read_are_refused(trains):
    with pytest.raises(UserError, match="trains must be one of feature_maps, .* joined by [+] and -, as everything"):
        dataclasses.replace(SETTINGS, trains=trains)


@pytest.mark.parametrize(
    "mixer, others",
    [
        ("kda", {"qkv.v.weight", "gate_down.weight", "gate.weight", "gate.bias", "out.weight"}),
        ("gdn", {"gate.weight", "norm.weight", "out.weight"}),
    ],
)
def test_queries_and_keys_are_what_the_weights_between_tokens_depend_on(mixer, others):
    """Values that are apart, the output's gate and its projection are left out, and so are kept attention and the
    rest."""
    student = swap(tiny_teacher("qwen3"), mixer, layers=(0, 2))
    chosen = {id(p) for p in SELECTORS["queries_and_keys"](student)}
    for slot in student.slots().values():
        assert {name for name, p in slot.mixer.named_parameters() if id(p) not in chosen} == others
    slots = student.slots().values()
    assert len(chosen) == sum(len(list(slot.mixer.parameters())) - len(others) for slot in slots)


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
