"""What is measured while a run goes: a JSON line for each step, always; Weights & Biases beside it."""

from collections.abc import Callable
from pathlib import Path

from convert.core import json_lines as lines
from convert.core import manifest
from convert.runs import records
from convert.core.console import console
from convert.runs.wandb_sink import Dashboard
from convert.core.errors import UserError
from convert.runs.schemas import Metric, Text


class Track:
    """`metrics.jsonl` and `generations.jsonl` in the run folder are the source of truth. `log` takes the step and
    tokens of the current stage. `model`: the fingerprint of what the run has made so far, its teacher at first."""

    def __init__(self, folder: Path, *, mode: str | None, config: dict, name: str):
        self.file = folder / "metrics.jsonl"
        self.texts = folder / "generations.jsonl"
        for file, kind in ((self.file, Metric), (self.texts, Text)):
            lines.mend(file)
            all(records.rows(file, kind))  # damage is said before anything is trained
        self.written: list[dict] = []
        self.stage = ""
        self.tokens_before = self.steps_before = 0
        self.model = config.get("teacher_fingerprint")
        self.dashboard = Dashboard.of(folder, mode=mode, config=config, name=name)

    def enter(self, stage: str, tokens_before: int = 0, steps_before: int = 0) -> None:
        """Later lines belong to `stage`, which has a W&B run of its own."""
        self.stage, self.tokens_before, self.steps_before = stage, tokens_before, steps_before
        self._tell(lambda board: board.enter(stage))

    def resume(self, step: int) -> None:
        """The stage goes on after `step` (0: from its start): its lines after that, from before a crash, are
        dropped."""
        with manifest.renewing(self.file.parent, self.file.name, self.texts.name):
            for file in (self.file, self.texts):
                lines.keep(file, lambda row: row["stage"] != self.stage or row["step"] <= step)
        lost = sorted(set(range(1, step + 1)) - {row["step"] for row in self.rows(self.stage)})
        if lost:
            console.print(
                f"{self.file} lacks {len(lost)} of the {step} lines of {self.stage}, from step {lost[0]} on: its curve"
                " has a gap there.",
                style="yellow",
            )

    def rows(self, stage: str) -> list[dict]:
        """The lines of one stage."""
        return [row for row in lines.read(self.file) if row["stage"] == stage]

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        row = {
            "stage": self.stage,
            "step": step,
            "global_step": self.steps_before + step,
            "tokens": self.tokens_before + tokens,
        } | numbers
        place = {key: row[key] for key in ("stage", "step", "global_step", "tokens")}
        if self.written:
            lines.append(self.texts, [place | text for text in self.written])
        lines.append(self.file, [row])
        texts = lines.read(self.texts) if self.dashboard and self.written else []
        self._tell(lambda board: board.log(row, numbers, texts))
        self.written = []

    def generations(self, rows: list[dict]) -> None:
        """Texts that belong to the next line: task, prompt, teacher, student, reference."""
        self.written = rows

    def made(self, model: str, facts: dict, folder: Path | None = None) -> None:
        """The stage made `model` (a fingerprint) out of `self.model`: a later run whose teacher it is goes on from
        it."""
        source, self.model = self.model, model
        self._tell(lambda board: board.made(source, model, facts, folder))

    def finish(self, found: dict, page: Path, numbers: dict[str, float]) -> None:
        """The evaluation, the page and the final numbers, in the table of runs."""
        self._tell(lambda board: board.finish(found, page, numbers))

    def close(self) -> None:
        self._tell(lambda board: board.close())

    def _tell(self, what: Callable[[Dashboard], None]) -> None:
        """W&B may fail as it likes: the run goes on without it."""
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
