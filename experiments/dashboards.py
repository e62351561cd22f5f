"""Make a W&B workspace for conversions: quality by generation first, then training, the norms inside the new mixers,
speed, and what was written.

    pip install -e '.[dashboards]' && python -m experiments.dashboards --entity ME    # prints its address

Runs are grouped by conversion; each stage of one is a run of its own, so a curve goes on from stage to stage over one
axis of tokens."""

from __future__ import annotations

import argparse

try:
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws
except ImportError:  # the extra [dashboards]: main() says so
    panels = ws = None
from wandb.errors import CommError, UsageError

from convert.cli import fail_in_words
from convert.core.errors import UserError
from convert.evaluation.tasks import TASKS
from convert.runs.keys import SCORINGS
from convert.runs.wandb_sink import PROJECT, is_reachable


def line(title: str, *names: str, log: bool = False) -> panels.LinePlot:
    """Plot some numbers over tokens."""
    return panels.LinePlot(title=title, x="tokens", y=list(names), log_y=log, title_x="tokens", max_runs_to_show=30)


def layers(title: str, prefix: str) -> panels.LinePlot:
    """Plot a number of all layers of the new mixers."""
    return panels.LinePlot(title=title, x="tokens", metric_regex=f"^{prefix}/layer_.*", log_y=True, title_x="tokens")


def workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace; its names are those that `convert.runs.tracking` and `convert.training` log."""
    gaps = [
        panels.BarPlot(
            title=f"Behind the teacher in {task}",
            metrics=[panels.SummaryMetric(f"gap/{task}/{scoring}") for scoring in SCORINGS],
        )
        for task in (name for name, task in TASKS.items() if not task.on_request)
    ]
    sections = [
        ws.Section(
            "Quality",
            is_open=True,
            panels=[
                panels.ScalarChart(
                    title="Perplexity over the teacher's", metric=panels.SummaryMetric("perplexity_ratio")
                ),
                panels.ScatterPlot(
                    title="KL and perplexity",
                    x=panels.SummaryMetric("kl_nats"),
                    y=panels.SummaryMetric("perplexity_ratio"),
                ),
                *gaps,
            ],
        ),
        ws.Section(
            "Training",
            is_open=True,
            panels=[
                line("Loss", "train/loss", log=True),
                line("Held-out perplexity", "held_out/perplexity", log=True),
                line("Correct answers by generation", "held_out/generation"),
                line("Gap by generation", "held_out/generation_gap"),
            ],
        ),
        ws.Section(
            "Inside",
            panels=[
                layers("Weights of the new mixers", "weights"),
                layers("Their gradients", "gradients"),
                line("Gradient norm", "train/grad_norm", log=True),
                line("Steps without a finite gradient", "train/skipped"),
                line("Rate", "train/lr"),
            ],
        ),
        ws.Section("Speed", panels=[line("Tokens per second", "speed/tokens_per_s")]),
        ws.Section(
            "Written",
            panels=[
                panels.WeavePanelSummaryTable(table_name="generations"),
                panels.WeavePanelSummaryTable(table_name="evaluation"),
                panels.MediaBrowser(title="report.html", media_keys=["report"]),
            ],
        ),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="Conversions",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=30),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="whose project it is")
    parser.add_argument("--project", default=PROJECT)
    args = parser.parse_args()
    if panels is None:
        raise UserError(
            "A workspace is made by the package wandb-workspaces, which is missing: pip install -e '.[dashboards]'."
        )
    made = workspace(args.entity, args.project)
    if not is_reachable():
        raise UserError(
            "A workspace lives on the W&B server, which does not answer. Offline, `wandb leet RUN/wandb` shows a run in"
            " the terminal."
        )
    try:
        made.save()
    except (CommError, UsageError, ValueError) as error:
        raise UserError(
            f"W&B did not take the workspace ({str(error).splitlines()[0]}). `wandb login` first; is --entity right?"
        ) from None
    print(made.url)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
