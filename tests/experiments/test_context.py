"""What a long context costs and is good for: lengths end where memory or patience does."""

import json
import shutil

import pytest
import torch

from convert.core.errors import UserError
from convert.evaluation.inference import context_cost
from convert.mixers import MLA
from convert.models.swap import swap
from convert.runs.language_schemas import MeasuredContext
from experiments import context
from tests.conftest import tiny_teacher


@pytest.mark.parametrize(
    "reason, words", [("memory", "free"), ("time", "--minutes allows"), ("full", "memory ends before")]
)
def test_lengths_end_where_memory_or_patience_does(monkeypatch, reason, words):
    def costs(model, name, length, dtype):
        if reason == "full" and length == 4096:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        seconds = 0.1 if reason != "time" or length == 1024 else 100.0
        return MeasuredContext(
            model="teacher",
            length=length,
            bytes=length,
            formula=length,
            time_to_first_token_s=seconds,
            tokens_per_s=1.0,
        )

    printed = []
    monkeypatch.setattr(context, "costs", costs)
    monkeypatch.setattr(context, "free_memory", lambda device: 20_000 if reason == "memory" else 1 << 60)
    rows = context.all_costs({"teacher": tiny_teacher("llama")}, None, 1.0, torch.float32, printed.append)["teacher"]
    assert [row.length for row in rows] == ([1024] if reason == "full" else [1024, 4096])
    assert words in printed[-1] and "left out" in printed[-1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_both_ways_to_decode_agree_and_float64_tells_rounding_from_a_difference(family, monkeypatch):
    student = swap(tiny_teacher(family), "mla", MLA.Options(cache_budget=0.5, start="svd"), (0, 2)).eval()
    _, logits, cache = context_cost(student, 64, torch.float32)
    worst, speeds = context._both_ways(student, logits, cache)
    assert worst < 1e-4 and set(speeds) == {"absorbed", "expanded"} and cache.get_seq_length() == 64
    assert context._absorbed_against_expanded(student, logits, cache).max_abs_logit_float64 is None
    absorbed = MLA._absorbed
    monkeypatch.setattr(MLA, "_absorbed", lambda self, *args: absorbed(self, *args) * 1.001)
    found = context._absorbed_against_expanded(student, logits, cache)
    assert found.max_abs_logit > 1e-4 and found.max_abs_logit_float64 == pytest.approx(found.max_abs_logit, rel=0.05)

    def coarse(self, *args):
        y = absorbed(self, *args)
        return y if y.dtype == torch.float64 else y * (1 + 1e-4 * torch.sin(1e4 * y))

    monkeypatch.setattr(MLA, "_absorbed", coarse)
    found = context._absorbed_against_expanded(student, logits, cache)
    assert found.max_abs_logit > 1e-4 and found.max_abs_logit_float64 < 1e-5
    assert student.dtype == torch.float32 and cache.layers[0].state[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_into_the_run(finished_run, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    monkeypatch.setattr(context, "HELD_OUT", 4096)
    monkeypatch.setattr(
        "sys.argv",
        [
            "context",
            str(mine),
            "--lengths",
            "64,128",
            "--needles",
            "1",
            "--needle-lengths",
            "256,99999",
            "--probes",
            "2",
            "--probe-lengths",
            "256,99999",
        ],
    )
    context.main()
    shown = capsys.readouterr().out
    assert "what a context costs" in shown and "perplexity by position" in shown and "needle found" in shown
    assert "multi_value" in shown
    found = json.loads((mine / "context.json").read_text())
    assert {(row["model"], row["length"]) for row in found["costs"]} == {
        (who, n) for who in ("teacher", "student") for n in (64, 128)
    }
    assert all(row["bytes"] == row["formula"] for row in found["costs"])
    assert {row["length"] for row in found["needles"]} == {256} and {row["depth"] for row in found["needles"]} == set(
        context.DEPTHS
    )
    assert {(row["model"], row["task"], row["length"], row["n"]) for row in found["probes"]} == {
        (who, task, 256, 2) for who in ("teacher", "student") for task in ("multi_key", "multi_value", "tracking")
    }
    assert "Recall in a text" in (mine / "report.html").read_text()
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
