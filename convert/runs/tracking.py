"""Tracking of a run: every step is a JSON line in the run's folder, and Weights & Biases shows the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.core import json_lines, manifest
from convert.core.console import console
from convert.core.errors import UserError
from convert.runs import records
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.schemas import GenerationRow, MetricRow
from convert.runs.wandb_sink import Dashboard


class Unwritten:
    """What the processes of a run that are not its first have in the place of a Track: it writes nothing."""

    model: str | None = None
    tokens_before = 0
    file = Path("metrics.jsonl")

    def enter(self, stage: str, tokens_before: int = 0, steps_before: int = 0) -> None:
        pass

    def resume(self, step: int) -> None:
        pass

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        pass

    def generations(self, rows: list[dict[str, Any]]) -> None:
        pass

    def rows(self, stage: str) -> list[dict[str, Any]]:
        raise RuntimeError("the first process alone reads its rows")

    def made(self, model: str, facts: dict[str, Any], folder: Path | None = None) -> None:
        pass

    def finish(self, found: Evaluation, page: Path, numbers: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class Track(Unwritten):
    """Writes metrics.jsonl and generations.jsonl, which are the source of truth, and tells W&B.

    `log` takes the step and tokens of the current stage. `model` is the fingerprint of the weights that the run has
    made so far, its teacher's at first."""

    def __init__(self, folder: Path, *, mode: str | None, config: dict[str, Any], name: str) -> None:
        self.file = folder / "metrics.jsonl"
        self.texts = folder / "generations.jsonl"
        for file, kind in ((self.file, MetricRow), (self.texts, GenerationRow)):
            json_lines.mend(file)
            all(records.rows(file, kind))  # damage is said before anything is trained
        self.written: list[dict[str, Any]] = []
        self.stage = ""
        self.tokens_before = self.steps_before = 0
        self.model = config.get("teacher_fingerprint")
        self.dashboard = Dashboard.of(folder, mode=mode, config=config, name=name)

    def enter(self, stage: str, tokens_before: int = 0, steps_before: int = 0) -> None:
        """Begin a stage: later lines belong to it, and it has a W&B run of its own."""
        self.stage, self.tokens_before, self.steps_before = stage, tokens_before, steps_before
        self._tell(lambda board: board.enter(stage))

    def resume(self, step: int) -> None:
        """Go on after `step` (0: from the stage's start): later lines of the stage, from before a crash, are
        dropped."""
        with manifest.renewing(self.file.parent, self.file.name, self.texts.name):
            for file in (self.file, self.texts):
                json_lines.keep(file, lambda row: row["stage"] != self.stage or row["step"] <= step)
        lost = sorted(set(range(1, step + 1)) - {row["step"] for row in self.rows(self.stage)})
        if lost:
            console.print(
                f"{self.file} lacks {len(lost)} of the {step} lines of {self.stage}, from step {lost[0]} on: its curve"
                " has a gap there.",
                style="yellow",
            )

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Lines of one stage, with the keys that they have in the file."""
        return [row for row in json_lines.read(self.file) if row["stage"] == stage]

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        """Write a line: `step` and `tokens` count within the stage."""
        row = {
            "stage": self.stage,
            "step": step,
            "global_step": self.steps_before + step,
            "tokens": self.tokens_before + tokens,
        } | numbers
        place = {key: row[key] for key in ("stage", "step", "global_step", "tokens")}
        if self.written:
            json_lines.append(self.texts, [place | text for text in self.written])
        json_lines.append(self.file, [row])
        texts = json_lines.read(self.texts) if self.dashboard and self.written else []
        self._tell(lambda board: board.log(row, numbers, texts))
        self.written = []

    def generations(self, rows: list[dict[str, Any]]) -> None:
        """Keep texts for the next line: dictionaries of task, prompt, teacher, student, reference."""
        self.written = rows

    def made(self, model: str, facts: dict[str, Any], folder: Path | None = None) -> None:
        """Say that the stage made `model` (a fingerprint) out of `self.model`: a run whose teacher it is goes on from
        it."""
        source, self.model = self.model, model
        self._tell(lambda board: board.made(source, model, facts, folder))

    def finish(self, found: Evaluation, page: Path, numbers: dict[str, float]) -> None:
        """Show the evaluation, the page and the final numbers in W&B's table of runs."""
        self._tell(lambda board: board.finish(found, page, numbers))

    def close(self) -> None:
        """End the W&B run of the current stage."""
        self._tell(lambda board: board.close())

    def _tell(self, what: Callable[[Dashboard], None]) -> None:
        """Call W&B; where it fails, the run goes on without it."""
        if self.dashboard is None:
            return
        try:
            what(self.dashboard)
        except UserError:
            raise
        except Exception as error:
            console.print(
                f"W&B failed ({type(error).__name__}: {error}); the run goes on without it, metrics.jsonl has"
                " everything."
            )
            self.dashboard = None
