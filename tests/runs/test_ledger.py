"""Who may work on a run's folder, and when it is a new one."""

import pytest

from convert.runs.ledger import open_run


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_sets_the_old_run_aside_once(name, tmp_path, monkeypatch):
    """What torchrun or Slurm starts again by itself has the same options, and goes on."""
    run, aside = tmp_path / "run", tmp_path / "run.old-1"
    open_run(run, {"lr": 1}, False)
    monkeypatch.setenv(name, "1")
    open_run(run, {"lr": 1}, True)
    assert not aside.exists()
    monkeypatch.setenv(name, "0")
    open_run(run, {"lr": 2}, True)
    assert aside.exists()
