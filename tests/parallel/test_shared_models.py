"""A model that processes share out is loaded, copied, swapped, saved and exported without any process holding it whole,
and it is the same model, bit for bit."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file, save_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, WeightConverter

from convert.core.errors import UserError
from convert.core.processes import rank
from convert.exporting import native
from convert.exporting.hub import write_weights
from convert.mixers import GDN, MLA
from convert.models import weight_files
from convert.models.loading import load_teacher
from convert.models.saving import fingerprint, load_in_parts, load_student, save_student
from convert.models.sharding import copied, is_shared_out
from convert.models.swap import swap
from convert.steps.set_decay import SetDecay
from tests.conftest import options_of, perturb, tiny_teacher, token_ids
from tests.e2e.conftest import teacher  # noqa: F401  # a fixture
from tests.parallel.fork import together

SWAPS = {"gpt_neox": ("linear", False), "llama": ("mla", True), "qwen3": ("mamba2", False)}


@pytest.fixture
def folders(teacher, tmp_path):  # noqa: F811
    """A folder of each family; one in several files."""
    for family, (_, is_tied) in SWAPS.items():
        model = tiny_teacher(family, tie_word_embeddings=is_tied)
        model.save_pretrained(tmp_path / family, max_shard_size="50KB" if family == "qwen3" else "5GB")
        for file in teacher.glob("tokenizer*"):
            shutil.copy(file, tmp_path / family)
    assert len(list((tmp_path / "qwen3").glob("model-*.safetensors"))) > 1
    return tmp_path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(token_ids(), use_cache=False).logits.clone()


def swapped(family: str, model: Any) -> Any:
    """All layers but one of them; mla has ranks that depend on all layers."""
    mixer, _ = SWAPS[family]
    options = options_of(mixer, kv_rank=None, rope_dim=None, cache_budget=0.5) if mixer == "mla" else options_of(mixer)
    torch.manual_seed(0)
    student = swap(model, mixer, options, (0, 2)).eval()
    if mixer == "mamba2":
        SetDecay("decay", 0.3).run(student, None)
    return student


def found(folder: Path, out: Path, is_shared: bool) -> dict[str, Any]:
    """What a teacher, a copy of it and its student give; the student is saved, read back and exported."""
    given: dict[str, Any] = {}
    for family in SWAPS:
        model = load_teacher(folder / family, shared=is_shared).model
        given[f"{family} teacher"] = logits(model), fingerprint(model)
        student = swapped(family, copied(model))
        assert is_shared == any(isinstance(p, DTensor) for p in student.parameters())
        given[f"{family} student"] = logits(student), student.config.mixers
        for name in ("step", "export"):
            if rank() == 0:
                (out / family / name).mkdir(parents=True)
        save_student(student, out / family / "step")
        write_weights(student, out / family / "export", torch.bfloat16, ())
        given[f"{family} fingerprint"] = fingerprint(student)
        if is_shared:
            again = load_in_parts(out / family / "step", model)
            given[f"{family} again"] = logits(again), fingerprint(again)
        else:
            again = load_student(out / family / "step", model, AutoModelForCausalLM.from_config)
        if rank() == 0:
            (out / family / "twice").mkdir()
        save_student(again, out / family / "twice")  # of a run that went on from there
    return given


def files(folder: Path) -> dict[str, str]:
    """The hashes of weights and indexes."""
    found = [*folder.rglob("*.safetensors"), *folder.rglob("*.index.json")]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


@pytest.mark.parametrize("size", [2, 3])
def test_shared_models_are_the_whole_ones_bit_for_bit(size, folders, monkeypatch):
    monkeypatch.setattr(weight_files, "LARGEST_FILE", "60KB")
    whole = found(folders, folders / "of-one", False)
    for given in together(folders / "run", size, found, folders, folders / "of-many", True):
        for name, (value, fact) in ((n, v) for n, v in given.items() if isinstance(v, tuple)):
            expected, its_fact = whole[name] if name in whole else (whole[f"{name.split()[0]} student"][0], None)
            assert torch.equal(value, expected), name
            assert fact == (its_fact or whole[f"{name.split()[0]} fingerprint"]), name
    for of_family in (folder / family for folder in (folders / "of-one", folders / "of-many") for family in SWAPS):
        once, twice = ({f.name: f.read_bytes() for f in (of_family / n).iterdir()} for n in ("step", "twice"))
        assert once == twice and "config.json" in once
    of_many, of_one = files(folders / "of-many"), files(folders / "of-one")
    assert of_many == of_one and len(of_one) > 9


@pytest.mark.parametrize("family", SWAPS)
def test_files_are_those_of_safetensors_and_hugging_face(family, tmp_path):
    """Byte for byte, with tied weights and tensors of several dtypes."""
    student = swapped(family, tiny_teacher(family, tie_word_embeddings=SWAPS[family][1]))
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    save_student(student, tmp_path / "ours")
    save_model(student, str(tmp_path / "theirs" / "model.safetensors"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    for limit in ("60KB", "5GB"):
        for name in ("ours", "theirs"):
            shutil.rmtree(tmp_path / name)
            (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(weight_files, "LARGEST_FILE", limit)
            write_weights(student, tmp_path / "ours", torch.float16, ["host.lm_head.weight"])
        state = student.state_dict()
        tied = student.get_expanded_tied_weights_keys(all_submodels=True)
        kept = {n: t for n, t in state.items() if n not in tied}
        cast = {n: t.half() if t.is_floating_point() and n != "host.lm_head.weight" else t for n, t in kept.items()}
        save_torch_state_dict(cast, tmp_path / "theirs", max_shard_size=limit, metadata={"format": "pt"})
        assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(folder, shared=True)
    return str(error.value)


def refusals(folders: dict[str, Path]) -> dict[str, str]:
    said = {name: refused(folder) for name, folder in folders.items() if name != "whole"}
    with pytest.MonkeyPatch.context() as patched:
        made = WeightConverter(["gate_proj.weight", "up_proj.weight"], ["gate_up.weight"], [Concatenate(0)])
        patched.setattr(weight_files, "get_model_conversion_mapping", lambda _: [made])
        return said | {"converted": refused(folders["whole"])}


def test_what_rows_cannot_give_is_refused_by_all(folders, tmp_path):
    """Damage is in the last row, which the last process reads."""
    changed = {}
    for name in ("missing", "misshapen", "left over", "untied"):
        changed[name] = tmp_path / name
        shutil.copytree(folders / "llama", changed[name])
        tensors = load_file(changed[name] / "model.safetensors")
        if name == "missing":
            del tensors["model.norm.weight"]
        elif name == "misshapen":
            tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
        elif name == "left over":
            tensors["model.stray"] = torch.zeros(3)
        else:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1] += 1
        save_file(tensors, changed[name] / "model.safetensors", {"format": "pt"})
    for said in together(tmp_path / "run", 2, refusals, changed | {"whole": folders / "llama"}):
        assert "1 tensors are missing or misshapen, first model.norm.weight" in said["missing"]
        assert "1 tensors are missing or misshapen, first model.norm.weight" in said["misshapen"]
        assert "first model.stray" in said["left over"]
        assert said["untied"].startswith("A head that config.json ties to the embedding must equal it")
        assert "has to be made of others first. Load it in one process" in said["converted"]


def test_a_copy_is_another_model(folders):
    assert together(folders / "run", 2, independent) == [True, True]


def independent() -> bool:
    first = copied(tiny_teacher("gpt_neox"))
    second = copied(first)
    before = logits(first)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.5)
    return torch.equal(before, logits(first)) and not torch.equal(before, logits(second))


def unwritable(folder: Path) -> str:
    student = copied(tiny_teacher("gpt_neox"))
    with pytest.raises((OSError, UserError)) as error:
        save_student(student, folder / "is-not-there")
    return type(error.value).__name__


def test_all_processes_hear_that_the_first_cannot_write(tmp_path):
    assert together(tmp_path / "run", 2, unwritable, tmp_path) == ["FileNotFoundError", "UserError"]


NATIVE = {  # what transformers has as deepseek_v3 and as qwen3_5_text
    "llama": ("mla", MLA.Options(shape="native", kv_rank=11, q_rank=9), (0, 1, 2)),
    "qwen3": ("gdn", GDN.Options(), (0, 2)),
}


def native_written(family: str, folder: Path) -> tuple[torch.Tensor, bool]:
    """Write the native model of a student that has left its start; its logits, and whether it is shared out."""
    model, (mixer, options, layers) = tiny_teacher(family, tie_word_embeddings=family == "llama"), NATIVE[family]
    torch.manual_seed(0)
    student = swap(model, mixer, options, layers)
    for slot in student.slots().values():
        perturb(slot.mixer)
    student = copied(student.eval())
    made = native.to_native(student)
    write_weights(made, folder, torch.bfloat16, native.in_full(student, made))
    assert torch.allclose(logits(made), logits(student), atol=1e-4)
    return logits(made), is_shared_out(made)


@pytest.mark.parametrize("family", NATIVE)
def test_the_native_model_of_a_shared_student_is_that_of_a_whole_one(family, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    expected, _ = native_written(family, tmp_path / "one")
    for found, is_shared in together(tmp_path / "run", 2, native_written, family, tmp_path / "two"):
        assert torch.equal(found, expected) and is_shared
    assert files(tmp_path / "two") == files(tmp_path / "one") and files(tmp_path / "one")
