"""What an export is compared by: float32, and float64 where float32 rounds too much."""

import copy

import pytest
import torch

from convert.exporting import verify
from tests.exporting.test_hub import IDS, make_student, tiny_tokenizer

OPTIONS = dict(card="# A\n", card_without_code="# B\n", dtype=torch.float32, input_ids=IDS)


@pytest.fixture(scope="module")
def student():
    return make_student("llama", "mla", None)


def export(student, folder, monkeypatch, errors: dict[torch.dtype, float]) -> dict:
    """Export to a place where logits are wrong by as much in each dtype."""

    def answer(folder, ids, *, trust_remote_code, dtype=torch.float32):
        return copy.deepcopy(student).to(dtype)(ids, use_cache=False).logits + errors[dtype]

    with monkeypatch.context() as changed, torch.no_grad():
        changed.setattr(verify, "check_in_clean_process", answer)
        return verify.export_and_verify(student, tiny_tokenizer(), folder, **OPTIONS)


def test_float64_decides_where_float32_rounds_too_much(student, tmp_path, monkeypatch):
    found = export(student, tmp_path / "model", monkeypatch, {torch.float32: 1e-2, torch.float64: 1e-9})
    assert found["max_abs_logit"] > found["allowed"] and 0 < found["max_abs_logit_float64"] < 1e-8
    found = export(student, tmp_path / "close", monkeypatch, {torch.float32: 0.0})
    assert "max_abs_logit_float64" not in found and next(student.parameters()).dtype == torch.float32


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_an_export_that_differs_in_float64_too_is_set_aside(student, tmp_path, monkeypatch, error):
    with pytest.raises(RuntimeError, match="must give the same logits in a clean process"):
        export(student, tmp_path / "model", monkeypatch, {torch.float32: 1e-2, torch.float64: error})
    assert not (tmp_path / "model").exists() and (tmp_path / "model.unchecked").exists()


def test_a_clean_process_computes_in_float64(student, tmp_path):
    verify.export(student, tiny_tokenizer(), tmp_path / "model", card="# A\n", dtype=torch.float32)
    logits = verify.check_in_clean_process(tmp_path / "model", IDS, dtype=torch.float64)
    with torch.no_grad():
        wanted = copy.deepcopy(student).double()(IDS, use_cache=False).logits
    assert logits.dtype == torch.float64 and (logits - wanted).abs().max() < 1e-6
