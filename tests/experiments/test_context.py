"""What a long context costs and is good for: lengths end where memory or patience does, positions are counted within
documents."""

import json
import math
import shutil

import pytest
import torch

from convert.core.errors import UserError
from convert.data.batches import Batch
from convert.evaluation import perplexity as measure
from convert.mixers import MLA
from convert.models.swap import swap
from experiments import context
from tests.conftest import VOCAB, tiny_teacher


def test_perplexity_by_position_is_that_of_the_tokens_there():
    model = tiny_teacher("llama")
    ids = torch.randint(0, VOCAB, (2, 201))
    positions = torch.cat([torch.arange(130), torch.arange(70)])[None].expand(2, -1)  # two documents in a row
    labels = ids[:, 1:].clone()
    labels[:, 129] = -100
    found = measure.perplexity_by_position(model, [Batch(ids[:, :-1], labels, positions)])
    assert list(found) == [0, 64, 128]
    with torch.no_grad():
        logs = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).logits.log_softmax(-1)
    nats = -logs.gather(2, ids[:, 1:, None])[..., 0]
    for start, end in ((0, 64), (64, 128), (128, 256)):
        there = (positions >= start) & (positions < end) & (labels != -100)
        assert found[start] == pytest.approx(math.exp(nats[there].mean()), rel=1e-5)
    whole = sum(
        math.log(found[start]) * int(((positions >= start) & (positions < end) & (labels != -100)).sum())
        for start, end in ((0, 64), (64, 128), (128, 256))
    )
    assert measure.perplexity(model, [Batch(ids[:, :-1], labels, positions)]) == pytest.approx(
        math.exp(whole / int((labels != -100).sum())), rel=1e-5
    )


@pytest.mark.parametrize(
    "reason, words", [("memory", "free"), ("time", "--minutes allows"), ("full", "memory ends before")]
)
def test_lengths_end_where_memory_or_patience_does(monkeypatch, reason, words):
    def costs(model, length, dtype):
        if reason == "full" and length == 4096:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        seconds = 0.1 if reason != "time" or length == 1024 else 100.0
        return {"length": length, "bytes": length, "first_token_s": seconds, "tokens_per_s": 1.0}

    said = []
    monkeypatch.setattr(context, "costs", costs)
    monkeypatch.setattr(context, "free_memory", lambda device: 20_000 if reason == "memory" else 1 << 60)
    rows = context.all_costs({"teacher": tiny_teacher("llama")}, None, 1.0, torch.float32, said.append)
    assert [row["length"] for row in rows] == ([1024] if reason == "full" else [1024, 4096])
    assert words in said[-1] and "left out" in said[-1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_ways_to_decode_agree_and_float64_tells_rounding_from_a_difference(family, monkeypatch):
    student = swap(tiny_teacher(family), "mla", MLA.Options(cache_budget=0.5, start="svd"), (0, 2)).eval()
    _, token, cache = measure.context(student, 64, torch.float32)
    worst, speeds = context._both_ways(student, token, cache)
    assert worst < 1e-4 and set(speeds) == {"absorbed", "expanded"} and cache.get_seq_length() == 64
    assert "max_abs_logit_float64" not in context._absorbed_against_expanded(student, token, cache)
    absorbed = MLA._absorbed
    monkeypatch.setattr(MLA, "_absorbed", lambda self, *args: absorbed(self, *args) * 1.001)
    found = context._absorbed_against_expanded(student, token, cache)
    assert found["max_abs_logit"] > 1e-4 and found["max_abs_logit_float64"] == pytest.approx(
        found["max_abs_logit"], rel=0.05
    )

    def coarse(self, *args):
        y = absorbed(self, *args)
        return y if y.dtype == torch.float64 else y * (1 + 1e-4 * torch.sin(1e4 * y))

    monkeypatch.setattr(MLA, "_absorbed", coarse)
    found = context._absorbed_against_expanded(student, token, cache)
    assert found["max_abs_logit"] > 1e-4 and found["max_abs_logit_float64"] < 1e-5
    assert student.dtype == torch.float32 and cache.layers[0].state[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_into_the_run(finished_run, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    monkeypatch.setattr(context, "READ", 4096)
    monkeypatch.setattr(
        "sys.argv", ["context", str(mine), "--lengths", "64,128", "--needles", "1", "--needle-lengths", "256,99999"]
    )
    context.main()
    shown = capsys.readouterr().out
    assert "what a context costs" in shown and "perplexity by position" in shown and "needle found" in shown
    found = json.loads((mine / "context.json").read_text())
    assert {(row["model"], row["length"]) for row in found["costs"]} == {
        (who, n) for who in ("teacher", "student") for n in (64, 128)
    }
    assert all(row["bytes"] == row["formula"] for row in found["costs"])
    assert {row["length"] for row in found["needles"]} == {256} and {row["depth"] for row in found["needles"]} == set(
        context.DEPTHS
    )
    assert set(found["perplexity_by_position"]) == {"teacher", "student"}
    assert "Perplexity by the tokens before" in (mine / "report.html").read_text()


def test_refusals_are_a_sentence(finished_run, tmp_path, monkeypatch):
    for arguments, words in (
        ([str(tmp_path)], "has none"),
        ([str(finished_run)] * 2, "told apart by their folders"),
        ([str(finished_run), "--lengths", "12,x"], "--lengths takes numbers of tokens"),
    ):
        monkeypatch.setattr("sys.argv", ["context", *arguments])
        with pytest.raises(UserError, match=words):
            context.main()
