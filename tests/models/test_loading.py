"""Loading a teacher, and every refusal before its weights are read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from convert.core.errors import UserError
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.exporting.hub import export
from convert.models import catalog
from convert.models.catalog import Source, resolve
from convert.models.loading import load_teacher, read_config
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from tests.conftest import tiny_teacher, token_ids
from tests.models.conftest import write_tokenizer


def forbid_weights(monkeypatch) -> None:
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


def test_load_a_folder(folder, capfd):
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    capfd.readouterr()
    teacher = load_teacher(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.WARNING, True)
    assert teacher.dtype == torch.bfloat16 and teacher.model.dtype == torch.float32
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.model.config._attn_implementation == "sdpa"
    tokenizer = teacher.tokenizer
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 2, 2)
    expected = tiny_teacher("gpt_neox").to(torch.bfloat16).float()
    ids = token_ids()
    assert torch.equal(teacher.model(ids).logits, expected(ids).logits)
    assert load_teacher(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_pad_token_is_kept(folder):
    write_tokenizer(folder, pad="w0")
    assert load_teacher(str(folder)).tokenizer.pad_token == "w0"


def test_a_student_loads_in_a_process_that_made_none(finished_run):
    code = f"from convert import load_teacher; print(type(load_teacher({str(finished_run)!r}).model).__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["ConvertedForCausalLM"], result.stderr


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_loads(family, tmp_path):
    tiny_teacher(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert torch.equal(load_teacher(str(tmp_path)).model(token_ids()).logits, tiny_teacher(family)(token_ids()).logits)


def test_a_run_is_a_teacher_and_its_code_is_not_run(folder, tmp_path, monkeypatch):
    student = swap(tiny_teacher("llama", tie_word_embeddings=True), "mamba2")
    run = tmp_path / "runs" / "tiny-mamba2"
    run.mkdir(parents=True)
    export(student, load_teacher(str(folder)).tokenizer, run / "model", card="")
    for code in (run / "model").glob("*.py"):
        code.write_text("raise RuntimeError('the code of a folder of ours was run')")
    trusted = []
    for auto in (AutoConfig, AutoModelForCausalLM):
        read = auto.from_pretrained
        monkeypatch.setattr(
            auto,
            "from_pretrained",
            lambda where, read=read, **how: trusted.append(how["trust_remote_code"]) or read(where, **how),
        )
    source = resolve(str(run))
    assert source == Source("tiny-mamba2", "run", str(run / "model"), catalog.FINEWEB)
    for trust in (False, True):
        teacher = load_teacher(source, trust_remote_code=trust)
        assert type(teacher.model) is ConvertedForCausalLM and not teacher.model.training
    assert torch.equal(teacher.model(token_ids(), use_cache=False).logits, student(token_ids(), use_cache=False).logits)
    assert trusted and not any(trusted)
    assert resolve(str(run / "model")).kind == "folder"


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 3):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"weight file .*model\.safetensors is damaged \(.*Copy or download"):
            load_teacher(str(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"holds its weights \(\*\.safetensors\)"):
        load_teacher(str(folder))


def test_incomplete_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 4}, {"intermediate_size": 48}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(
            UserError, match="Weights must fit config.json.*missing or misshapen, first gpt_neox.layers"
        ):
            load_teacher(str(folder))


def test_damaged_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_teacher(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    with pytest.raises(UserError, match="cannot be read"):
        load_teacher(str(folder))


def test_pickles_are_refused_unless_trusted(folder):
    model = tiny_teacher("gpt_neox")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"must be safetensors.*only pytorch_model\.bin\. Convert it .* --trust-remote-code"
    ):
        load_teacher(str(folder))
    assert torch.equal(
        load_teacher(str(folder), trust_remote_code=True).model(token_ids()).logits, model(token_ids()).logits
    )


def test_tokenizers_that_do_not_fit(folder, monkeypatch):
    forbid_weights(monkeypatch)
    write_tokenizer(folder, words=120)
    with pytest.raises(UserError, match="must fit its embedding.* ids up to 119 for 99 rows"):
        load_teacher(str(folder))
    write_tokenizer(folder, eos=None)
    with pytest.raises(UserError, match="must have an end-of-text token"):
        load_teacher(str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    # gpt_neox makes up two tokens
    with pytest.raises(UserError, match=r"has no tokenizer, or one without words.*tokenizer\.json"):
        load_teacher(str(folder))


def test_a_folder_without_tokenizer(tmp_path, monkeypatch):
    forbid_weights(monkeypatch)
    tiny_teacher("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no readable tokenizer"):
        load_teacher(str(tmp_path))


def test_unsupported_teachers_are_refused_before_weights_are_read(folder, monkeypatch):
    forbid_weights(monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UserError, match="cannot be a teacher. Teachers must have plain weights"):
        load_teacher(str(folder))
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    with pytest.raises(UserError, match="cannot be a teacher's. Teachers must be of the families gpt_neox, .*'gpt2'"):
        load_teacher(str(folder))


def test_remote_code_runs_only_if_trusted(folder):
    code = "from transformers import PreTrainedConfig\nclass Odd(PreTrainedConfig):\n    model_type = 'odd'\n"
    (folder / "odd.py").write_text(code)
    (folder / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}))
    with pytest.raises(UserError, match="has 'odd'. It brings its own code; to run that, pass --trust-remote-code"):
        read_config(resolve(str(folder)))
    assert read_config(resolve(str(folder)), trust_remote_code=True).model_type == "odd"
    (folder / "config.json").write_text(json.dumps({"model_type": "odd"}))
    with pytest.raises(UserError, match=r"a model type that transformers knows; .* has 'odd'\.$"):
        read_config(resolve(str(folder)), trust_remote_code=True)


def test_gguf_files(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"not a GGUF file")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(UserError, match=r"needs gguf and accelerate; missing: gguf\. pip install -e '\.\[smollm2\]'"):
        load_teacher(str(file))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"tiny\.gguf cannot be read"):
        load_teacher(str(file))


def trimmed(folder: Path, last: int) -> None:
    """A tokenizer of 90 tokens whose last one has this id."""
    words = {f"w{i}": i for i in range(89)} | {"w89": last}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", eos_token="w2").save_pretrained(folder)


def test_ids_may_be_larger_than_their_number(folder, tmp_path, monkeypatch):
    trimmed(folder, 98)
    assert load_teacher(str(folder)).tokenizer("w89")["input_ids"] == [98]
    trimmed(folder, 99)
    with pytest.raises(UserError, match="must fit its embedding.* ids up to 99 for 99 rows"):
        load_teacher(str(folder))
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    trimmed(folder, 70_000)
    (tmp_path / "text.txt").write_text("w89 w3 " * 40)
    tokens = tokenize(corpus(str(tmp_path / "text.txt")), PreTrainedTokenizerFast.from_pretrained(folder))
    assert {3, 70_000} <= set(tokens.train.ids.tolist())
