"""A teacher is loaded whole: what its files hold and its configuration does not know is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.core.errors import UserError
from convert.models.loading import load_teacher
from convert.models.swap import swap
from tests.conftest import FAMILIES, WIDTH, options_of, tiny_teacher, token_ids
from tests.models.conftest import write_tokenizer
from tests.models.test_student import logits_of


def saved(folder, model, more: dict | None = None, config: dict | None = None):
    """A teacher's folder, with more tensors in its file and other settings in its configuration."""
    model.save_pretrained(folder)
    write_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | (config or {})))
    return str(folder)


LAYER = {"gpt_neox": "gpt_neox.layers.1.attention.", "llama": "model.layers.1.self_attn."}
LEFT_OVER = {
    "biases": ("llama", {}, {LAYER["llama"] + "q_proj.bias": torch.ones(WIDTH)}),
    "norms of queries": ("llama", {}, {LAYER["llama"] + "q_norm.weight": torch.ones(8)}),
    "a layer more": ("gpt_neox", dict(num_hidden_layers=2), {}),
    "biases that the configuration denies": (
        "qwen2",
        dict(model_type="llama", architectures=None, attention_bias=False),
        {},
    ),
    "norms that the family has not": ("qwen3", dict(model_type="llama", architectures=None), {}),
    "a second head": ("llama", {}, {"value_head.weight": torch.ones(1, WIDTH)}),
    "biases of MLPs": ("mistral", {}, {"model.layers.0.mlp.up_proj.bias": torch.ones(64)}),
}


@pytest.mark.parametrize("family, config, more", LEFT_OVER.values(), ids=LEFT_OVER)
def test_what_the_configuration_does_not_know_is_named(family, config, more, tmp_path):
    where = saved(tmp_path / "teacher", tiny_teacher(family), more, config)
    name = next(iter(more), r"\S+")
    with pytest.raises(UserError, match=rf"read whole; .*teacher holds \d+ tensors .* no place for, first {name}"):
        load_teacher(where)


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_old_checkpoints_are_no_weights(family, tmp_path):
    """Causal masks, and rotary frequencies in half precision, if they are those of the configuration."""
    teacher, place = tiny_teacher(family), LAYER.get(family, LAYER["llama"])
    mask, frequencies = torch.ones(1, 1, 64, 64).tril().bool(), teacher.base_model.rotary_emb.inv_freq
    old = {
        place + "rotary_emb.inv_freq": frequencies.half(),
        place + "bias": mask,
        place + "masked_bias": torch.tensor(-1e9),
    }
    teacher_model = load_teacher(saved(tmp_path / "old", teacher, old))
    assert torch.equal(logits_of(teacher_model.model, token_ids()), logits_of(teacher, token_ids()))
    other = old | {place + "rotary_emb.inv_freq": (0.9 * frequencies).half()}
    with pytest.raises(
        UserError,
        match=r"frequencies must be those of config\.json .*; .*\.1\..*rotary_emb.inv_freq in .*other holds others",
    ):
        load_teacher(saved(tmp_path / "other", teacher, other))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_copy_of_tied_embeddings(family, tmp_path):
    """An equal one is no weight of its own; another one contradicts the configuration, a teacher's and a student's."""
    teacher = tiny_teacher(family, tie_word_embeddings=True)
    table, head = teacher.get_input_embeddings().weight.detach(), "lm_head.weight"
    student = swap(tiny_teacher(family, tie_word_embeddings=True), "linear")
    for name, model, place in (("teacher", teacher, head), ("student", student, f"host.{head}")):
        equal = load_teacher(saved(tmp_path / f"equal-{name}", model, {place: table.clone()})).model
        assert (
            equal.get_input_embeddings().weight is equal.get_output_embeddings().weight
            and equal.config.tie_word_embeddings
        )
        other = saved(tmp_path / f"other-{name}", model, {place: table.flip(0).contiguous()})
        with pytest.raises(
            UserError,
            match=rf"ties to the embedding must equal it; .*other-{name} holds another .* tie_word_embeddings: false",
        ):
            load_teacher(other)


def test_a_student_is_loaded_whole_too(tmp_path):
    student = swap(tiny_teacher("llama"), "mla", options_of("mla"))
    where = saved(tmp_path / "student", student)
    load_teacher(where)
    saved(tmp_path / "student", student, {"host.model.layers.0.self_attn.mixer.q.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"no place for, first host\.model\.layers\.0\.self_attn\.mixer\.q\.bias"):
        load_teacher(where)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    where = saved(tmp_path / "teacher", tiny_teacher("llama"))
    get_peft_model(tiny_teacher("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(where)
    with pytest.raises(UserError, match=r"has an adapter beside them\. Merge it"):
        load_teacher(where)


def test_a_configuration_far_larger_than_its_weights_takes_no_memory(tmp_path, monkeypatch):
    """100 GB would be allocated before the missing tensors show."""
    where = saved(
        tmp_path / "teacher", tiny_teacher("llama"), config=dict(intermediate_size=1_000_000, num_hidden_layers=250)
    )
    monkeypatch.setattr("convert.models.loading._load_model", lambda *_: pytest.fail("memory was asked for"))
    with pytest.raises(UserError, match=r"describes 24,\d{3},\d{3},\d{3} parameters, and its files hold 3\d,\d{3}"):
        load_teacher(where)
