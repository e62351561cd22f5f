"""Whatever fails while a stranger's files are read is one sentence."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
)

from convert.core.errors import UserError
from convert.models import loading
from convert.models.catalog import resolve
from convert.models.loading import load_teacher, read_config
from tests.conftest import tiny_teacher


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
