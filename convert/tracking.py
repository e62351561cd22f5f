"""What is measured while a run goes: a JSON line for each step, always; Weights & Biases beside it."""

import json
import netrc
import os
import secrets
from pathlib import Path

from convert.errors import UserError


class Track:
    """`metrics.jsonl` and `generations.jsonl` in the run folder are the source of truth. `log` takes the step and tokens of the current
    stage."""

    def __init__(self, folder: Path, *, mode: str | None, config: dict, name: str):
        self.file = folder / "metrics.jsonl"
        self.texts = folder / "generations.jsonl"
        self.written: list[dict] = []
        self.stage = ""
        self.tokens_before = self.steps_before = 0
        self.wandb = _start_wandb(folder, mode, config, name)

    def enter(self, stage: str, tokens_before: int, steps_before: int) -> None:
        """Later lines belong to `stage`."""
        self.stage, self.tokens_before, self.steps_before = stage, tokens_before, steps_before

    def resume(self, step: int) -> None:
        """The stage goes on after `step` (0: from its start): its lines after that, from before a crash, are dropped."""
        for file in (self.file, self.texts):
            if file.exists():
                rows = [line for line in file.read_text().splitlines() if _stays(line, self.stage, step)]
                aside = file.with_suffix(".writing")
                aside.write_text("".join(row + "\n" for row in rows))
                os.replace(aside, file)

    def rows(self, stage: str) -> list[dict]:
        """The lines of one stage."""
        return [row for row in map(json.loads, self.file.read_text().splitlines()) if row["stage"] == stage]

    def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
        row = {"stage": self.stage, "step": step, "global_step": self.steps_before + step, "tokens": self.tokens_before + tokens} | numbers
        place = {key: row[key] for key in ("stage", "step", "global_step", "tokens")}
        if self.written:
            with self.texts.open("a") as file:
                file.writelines(json.dumps(place | text) + "\n" for text in self.written)
        with self.file.open("a") as file:
            print(json.dumps(row), file=file)
        if self.wandb:
            logged = {f"{self.stage}/{key}": value for key, value in numbers.items()}
            if self.written:
                logged["generations"] = self._table()
            self.wandb.log({"step": row["global_step"], "tokens": row["tokens"]} | logged)
        self.written = []

    def generations(self, rows: list[dict]) -> None:
        """Texts that belong to the next line: task, prompt, teacher, student, reference."""
        self.written = rows

    def _table(self):
        """All rows so far, so that one prompt can be read down the steps."""
        import wandb

        table = wandb.Table(columns=["stage", "step", "tokens", *self.written[0]], log_mode="IMMUTABLE")
        for row in map(json.loads, self.texts.read_text().splitlines()):
            table.add_data(row["stage"], row["global_step"], row["tokens"], *(row[key] for key in self.written[0]))
        return table

    def summary(self, numbers: dict[str, float]) -> None:
        """Final numbers of the run, for the table of runs."""
        if self.wandb:
            self.wandb.summary.update(numbers)

    def evaluation(self, found: dict, page: Path) -> None:
        """The rows of evaluation.json as a table, each score and gap for the table of runs, and the page."""
        if not self.wandb:
            return
        import wandb

        columns = ("task", "model", "reading", "score", "low", "high", "n", "unparsable")
        table = wandb.Table(columns=list(columns), data=[[row[key] for key in columns] for row in found["rows"]])
        self.wandb.log({"evaluation": table, "report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        self.wandb.summary.update({f"score/{row['task']}/{row['reading']}/{row['model']}": row["score"] for row in found["rows"]})
        self.wandb.summary.update({f"gap/{row['task']}/{row['reading']}": row["gap"] for row in found["gaps"]})

    def lineage(self, teacher: str, teacher_id: str, model: Path, model_id: str, made: dict) -> None:
        """The student as an artifact that was made from its teacher's: a later run whose teacher is this student goes on from it. The
        files stay where they are."""
        if not self.wandb:
            return
        import wandb

        if not self.wandb.offline:  # W&B takes no inputs offline: the student's metadata name its teacher
            self.wandb.use_artifact(wandb.Artifact(f"model-{teacher_id}", "model", metadata={"name": teacher}))
        student = wandb.Artifact(f"model-{model_id}", "model", metadata=made | {"made_from": f"model-{teacher_id}"})
        student.add_reference(model.absolute().as_uri(), checksum=False)
        self.wandb.log_artifact(student)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def _stays(line: str, stage: str, resume_step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return False
    return row["stage"] != stage or row["step"] <= resume_step


def _start_wandb(folder: Path, mode: str | None, config: dict, name: str):
    """A W&B run, or None. Without `mode`: online where a key is configured, else offline. A stored id continues the run."""
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")
    try:
        import wandb
    except ImportError:
        return None
    id_file = folder / "wandb-id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    chosen = mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if chosen == "disabled":
        return None

    def start(mode: str):
        return wandb.init(
            project="conversion-workbench", dir=folder, id=id_file.read_text(), resume="allow", mode=mode, name=name, config=config,
            group=Path(str(config.get("teacher", ""))).name or None, job_type=config.get("target"),
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    try:
        run = start(chosen)
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0]
        if mode == "online":
            raise UserError(
                f"W&B must be reachable for --wandb online ({reason}). Leave the flag out: offline runs can be uploaded later."
            ) from None
        print(f"W&B does not answer ({reason}); this run is tracked offline.")
        run = start("offline")
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def _has_key() -> bool:
    """Whether W&B would find credentials without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
