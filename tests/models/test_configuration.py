"""A fact of a student has one place: changed by the usual way of transformers, it is the same in the live host, in the
file, and after loading."""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from convert.exporting import native
from convert.exporting.hub import export
from convert.mixers import MLA
from convert.models.config import ConvertedConfig
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from tests.conftest import FAMILIES, VOCAB, assert_close, options_of, tiny_teacher, token_ids
from tests.exporting.test_hub import tiny_tokenizer
from tests.models.test_student import CACHED, logits_of

OF_HOST = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
)


def student_of(family: str = "llama", **changes) -> ConvertedForCausalLM:
    return swap(tiny_teacher(family, **changes), "mamba2", options_of("mamba2"), (0, 2))


def again(student, folder) -> ConvertedForCausalLM:
    student.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("rows", [VOCAB + 9, VOCAB - 9])
def test_more_or_fewer_tokens(family, tied, rows, tmp_path):
    student, ids = student_of(family, tie_word_embeddings=tied), token_ids() % (VOCAB - 9)
    before = logits_of(student, ids)
    student.resize_token_embeddings(rows)
    logits = logits_of(student, ids)
    assert logits.shape[-1] == rows and torch.equal(logits[..., : VOCAB - 9], before[..., : VOCAB - 9])
    assert student.config.vocab_size == student.host.config.vocab_size == rows
    loaded = again(student, tmp_path / "saved")
    assert torch.equal(logits_of(loaded, ids), logits)
    export(student, tiny_tokenizer(), tmp_path / "exported", card="")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "exported"), ids), logits)
    more = swap(loaded, "linear", layers=(1,))
    assert torch.equal(logits_of(again(more, tmp_path / "more"), ids), logits_of(more, ids))
    assert student(ids, labels=ids).loss.isfinite()


def test_more_tokens_in_a_native_export():
    student, ids = swap(tiny_teacher("llama"), "mla", MLA.Options(shape="native", kv_rank=11)), token_ids()
    student.host.resize_token_embeddings(VOCAB + 9)  # by the host itself: it is the same fact
    assert student.config.vocab_size == VOCAB + 9
    assert_close(logits_of(native.to_native(student), ids), logits_of(student, ids), 1e-5)


VALUES = {
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "use_cache": False,
    "max_position_embeddings": 1024,
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("where", ["student", "host"])
def test_a_field_changed_in_either_place(name, where, tmp_path):
    student = student_of()
    setattr(student.config if where == "student" else student.host.config, name, VALUES[name])
    loaded, ids = again(student, tmp_path), token_ids()
    for model in (student, loaded, copy.deepcopy(student)):
        assert getattr(model.config, name) == getattr(model.host.config, name) == VALUES[name]
        assert model.config.host is model.host.config
    assert torch.equal(logits_of(loaded, ids), logits_of(student, ids))


def test_no_field_is_in_a_file_twice(tmp_path):
    student_of().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not set(OF_HOST) & set(config) and set(OF_HOST) - {"eos_token_id"} <= set(config["host"])
    assert config["host"]["model_type"] == "llama"


def test_a_file_of_before_holds_them_twice(tmp_path):
    """What was written outside counts, as it did: resized students could be told by it alone."""
    student, ids = student_of(), token_ids()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {name: config["host"][name] for name in OF_HOST if name in config["host"]}
    config["host"]["vocab_size"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits_of(student, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, tmp_path):
    # cast by loading: `.to` would cast the rotary frequencies of any model, too
    student_of().save_pretrained(tmp_path / "float32")
    student, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype), token_ids()
    loaded = again(student, tmp_path)
    assert {loaded.dtype, loaded.host.dtype, loaded.config.dtype} == {dtype} == {p.dtype for p in loaded.parameters()}
    assert torch.equal(logits_of(loaded, ids), logits_of(student, ids))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).host.dtype == torch.float32


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_attention_of_kept_layers(kind, tmp_path):
    student, ids = student_of(), token_ids()
    expected = logits_of(student, ids)
    student.set_attn_implementation(kind)
    student.save_pretrained(tmp_path)
    for model in (student, AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=kind)):
        assert (
            model.config._attn_implementation
            == model.host.model.layers[1].self_attn.config._attn_implementation
            == kind
        )
        assert_close(logits_of(model, ids), expected, CACHED)


def test_embeddings_that_part(tmp_path):
    """A head of its own, given to a student whose embeddings were tied."""
    student, ids = student_of(tie_word_embeddings=True), token_ids()
    student.config.tie_word_embeddings = False
    student.get_output_embeddings().weight = torch.nn.Parameter(student.get_input_embeddings().weight.detach().flip(0))
    assert torch.equal(logits_of(again(student, tmp_path), ids), logits_of(student, ids))


def test_a_swap_leaves_the_attention_of_the_host_as_it_is():
    teacher = tiny_teacher("llama")
    teacher.set_attn_implementation("eager")
    assert (
        swap(teacher, "linear", layers=(1,)).config._attn_implementation
        == teacher.config._attn_implementation
        == "eager"
    )


def test_a_configuration_alone():
    """Empty, by the auto class, copied, as a dictionary."""
    assert ConvertedConfig().mixers == [] and AutoConfig.for_model("converted").model_type == "converted"
    config = student_of().config
    for other in (
        copy.deepcopy(config),
        ConvertedConfig.from_dict(config.to_dict()),
        ConvertedConfig(config.host.to_dict(), config.mixers),
    ):
        assert (
            other.host.to_dict() | {"dtype": None} == config.host.to_dict() | {"dtype": None}
            and other.mixers == config.mixers
        )


def test_a_student_that_was_read_writes_what_one_just_made_does(tmp_path):
    """A run that goes on reads its student; its files are those of a run that nothing stopped, and name no folder of
    the machine that wrote them."""
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    made = swap(AutoModelForCausalLM.from_pretrained(tmp_path / "teacher"), "mamba2", options_of("mamba2"), (0, 2))
    assert made.host.config.dtype == torch.float32  # which a configuration that was read leaves open
    again(made, tmp_path / "made").save_pretrained(tmp_path / "read")
    made.config.save_pretrained(tmp_path / "config")
    AutoConfig.from_pretrained(tmp_path / "config").save_pretrained(tmp_path / "config again")
    for one, other in (("made", "read"), ("config", "config again")):
        text = (tmp_path / one / "config.json").read_text()
        assert text == (tmp_path / other / "config.json").read_text() and str(tmp_path) not in text
