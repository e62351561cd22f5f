"""The machine's speed is measured once, and again where that cannot be read or was of another machine."""

import pytest
import torch

from convert.planning import machine_speed


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Which rates were measured; each measurement gives one more."""
    calls = []
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_speed, "_rate", lambda *_: float(calls.append(1) or len(calls)))
    monkeypatch.setattr(machine_speed, "matmul_rate", machine_speed.matmul_rate.__wrapped__)
    monkeypatch.setattr(machine_speed, "scan_rate", machine_speed.scan_rate.__wrapped__)
    monkeypatch.setattr(machine_speed, "delta_rule_rate", machine_speed.delta_rule_rate.__wrapped__)
    return calls


def rates() -> list[float]:
    found = [machine_speed.matmul_rate("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    found += machine_speed.scan_rate("cpu"), machine_speed.delta_rule_rate("cpu")
    return [rate.per_second for rate in found]


def test_each_rate_is_measured_once(measured, tmp_path):
    assert rates() == rates() == [1.0, 2.0, 3.0, 4.0] and len(measured) == 4
    rate, file = machine_speed.scan_rate("cpu"), tmp_path / "cache" / "machine-speed.json"
    assert rate.file == file and f"kept; remove {file} to measure again" in rate.origin
    file.unlink()
    assert rates() == [5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"rates": {}}', b"\xff", None])
def test_a_damaged_file_is_measured_anew(damage, measured, tmp_path):
    rates()
    file = tmp_path / "cache" / "machine-speed.json"
    file.write_bytes(file.read_bytes().replace(b"3.0", b"9.0") if damage is None else damage)
    assert rates() == [5.0, 6.0, 7.0, 8.0] and rates() == [5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("change", ["processor", "torch", "threads"])
def test_another_machine_is_measured_for_itself_and_forgets_nothing(change, measured, monkeypatch):
    assert rates() == [1.0, 2.0, 3.0, 4.0]
    with monkeypatch.context() as patched:
        if change == "processor":
            patched.setattr(machine_speed, "processor", lambda device: "another")
        elif change == "torch":
            patched.setattr(torch, "__version__", "9.9")
        else:
            patched.setattr(torch, "get_num_threads", lambda: 64)
        assert rates() == [5.0, 6.0, 7.0, 8.0]
    assert rates() == [1.0, 2.0, 3.0, 4.0]


def test_a_cache_that_cannot_be_written_is_no_obstacle(measured, tmp_path):
    (tmp_path / "cache").write_text("a file")
    rate = machine_speed.scan_rate("cpu")
    assert (rate.per_second, rate.file, rate.origin) == (1.0, None, "measured now")


def test_a_rate_is_of_the_best_call(monkeypatch):
    monkeypatch.setattr(machine_speed, "SECONDS", 0.01)
    assert machine_speed._rate(lambda: None, 1.0, torch.device("cpu")) > 1e4
    assert torch.get_num_threads() >= 1
