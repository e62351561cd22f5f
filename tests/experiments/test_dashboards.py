"""The workspace shows what a run logs, by its names."""

import json

import pytest

pytest.importorskip("wandb_workspaces", reason="the extra [dashboards]")

from convert.core.errors import UserError
from experiments import dashboards


def test_every_curve_is_of_something_that_a_run_logs(finished_run):
    logged = {key for line in (finished_run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    shown = [panel for section in dashboards.workspace("me", "mine").sections for panel in section.panels]
    curves = {name for panel in shown if isinstance(panel, dashboards.panels.LinePlot) for name in panel.y}
    assert len(curves) >= 8 and curves <= logged
    patterns = [
        panel.metric_regex for panel in shown if isinstance(panel, dashboards.panels.LinePlot) and panel.metric_regex
    ]
    assert len(patterns) == 2 and all(
        any(name.startswith(p[1:].split("/")[0] + "/layer_") for name in logged) for p in patterns
    )


def test_it_is_a_workspace_of_that_project():
    made = dashboards.workspace("me", "mine")._to_model()
    assert (made.entity, made.project) == ("me", "mine")


def test_without_network_it_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(dashboards, "is_reachable", lambda: False)
    monkeypatch.setattr("sys.argv", ["dashboards", "--entity", "me"])
    with pytest.raises(UserError, match="lives on the W&B server, which does not answer"):
        dashboards.main()
