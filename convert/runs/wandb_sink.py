"""Weights & Biases shows what the files of a run hold: a W&B run for each stage, all in one group, over one axis of
tokens.

It is offline where no key is configured, prints nothing, and never stops a run: a server that does not answer costs
seconds, and what it missed is in the run's folder for `wandb sync`."""

import hashlib
import netrc
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from convert.core.console import console, short, visible
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.core.network import answers
from convert.runs.evaluation_schemas import Evaluation

PROJECT = "conversion-workbench"
# columns of the table of generations
COLUMNS = ("stage", "global_step", "tokens", "task", "prompt", "teacher", "student", "reference")
SCORES = ("task", "model", "scoring", "score", "low", "high", "n", "unparsable")
TAG = 64  # characters that W&B takes in a name
PATIENCE: dict[str, Any] = {  # a server that is gone costs seconds, not the library's default of hours
    "init_timeout": 20,
    "finish_timeout": 30,
    "x_graphql_retry_max": 3,
    "x_graphql_retry_wait_max_seconds": 5,
    "x_file_stream_retry_max": 3,
    "x_file_stream_retry_wait_max_seconds": 5,
    "x_file_transfer_retry_max": 3,
    "x_file_transfer_retry_wait_max_seconds": 5,
}


class Dashboard:
    """The W&B runs of one conversion. `mode` is "online" or "offline"; with `must_answer` a server that does not answer
    is a UserError."""

    def __init__(
        self, folder: Path, mode: str, config: dict[str, Any], name: str, *, must_answer: bool = False
    ) -> None:
        self.folder, self.mode, self.name, self.must_answer = folder, mode, name, must_answer
        self.config = _shown(config)
        id_file = folder / "wandb-id"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        self.id = id_file.read_text(encoding="utf-8").strip()
        if not re.fullmatch("[0-9a-f]{8}", self.id):
            raise UserError(
                f"{id_file} is damaged: W&B's name of a run is eight hexadecimal digits. Remove it: the curves then"
                " begin anew."
            )
        self.run: Any = None

    @staticmethod
    def of(folder: Path, *, mode: str | None, config: dict[str, Any], name: str) -> "Dashboard | None":
        """Make the dashboard of a run; None where W&B is disabled. Without `mode` WANDB_MODE decides, else it is online
        where a key is configured, and offline where none is."""
        chosen = mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if chosen == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        if chosen == "online" and not is_reachable():
            if mode == "online":
                raise UserError(
                    f"W&B must be reachable for --wandb online, and {_server()} is not. Leave the flag out: {LATER}."
                )
            console.print(f"W&B does not answer; this run is tracked offline. {LATER.capitalize()}.")
            chosen = "offline"
        return Dashboard(folder, chosen, config, name, must_answer=mode == "online")

    def enter(self, stage: str) -> None:
        """Begin the W&B run of this stage; a stored id continues it."""
        self.close()
        import wandb

        def start(mode: Any) -> Any:
            return wandb.init(
                project=PROJECT,
                dir=self.folder,
                id=_plain(f"{self.id}-{stage}"),
                resume="allow",
                mode=mode,
                name=short(f"{self.name} {stage}", 128),
                group=f"{short(self.name, 100)} {self.id}",
                job_type=_plain(stage),
                tags=[short(tag, TAG) for tag in (self.config.get("target"), self._teacher()) if tag],
                config=self.config,
                settings=wandb.Settings(silent=True, console="off", **PATIENCE),
            )

        try:
            self.run = start(self.mode)
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            if self.must_answer:
                raise UserError(
                    f"W&B must be reachable for --wandb online ({reason}). Leave the flag out: {LATER}."
                ) from None
            console.print(f"W&B does not answer ({reason}); this run is tracked offline. {LATER.capitalize()}.")
            self.mode = "offline"
            wandb.teardown()  # the service that still tries holds the run's id
            self.run = start("offline")
        self.run.define_metric("step")
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="tokens")

    def _teacher(self) -> str:
        return Path(str(self.config.get("teacher", ""))).name

    def log(self, place: dict[str, Any], numbers: dict[str, float], texts: Sequence[dict[str, Any]]) -> None:
        """Log a step. `texts` are all that were written so far, where there are new ones, so that one prompt can be
        read down the steps."""
        import wandb

        logged = {"step": place["global_step"], "tokens": place["tokens"]} | numbers
        if texts:
            rows = [[text.get(column) for column in COLUMNS] for text in texts]
            logged["generations"] = wandb.Table(columns=list(COLUMNS), data=rows, log_mode="IMMUTABLE")
        self.run.log(logged)

    def made(self, source: str | None, model: str, facts: dict[str, Any], folder: Path | None) -> None:
        """Log a student as an artifact that was made from another's or the teacher's. Its files stay where they
        are."""
        import wandb

        if not self.run.offline:  # W&B takes no inputs offline: there a student's metadata name what it was made from
            self.run.use_artifact(wandb.Artifact(f"model-{source}", "model", metadata={"name": self._teacher()}))
        artifact = wandb.Artifact(
            f"model-{model}", "model", metadata=_shown(facts | {"made_from": f"model-{source}", "in": self.name})
        )
        if folder is not None:
            artifact.add_reference(folder.absolute().as_uri(), checksum=False)
        self.run.log_artifact(artifact, aliases=[self.run.job_type, _plain(str(facts.get("architecture", "student")))])

    def finish(self, found: Evaluation, page: Path, numbers: dict[str, float]) -> None:
        """Log the rows of evaluation.json as a table, each score and gap as a number, and the page."""
        import wandb

        table = wandb.Table(columns=list(SCORES), data=[[getattr(row, key) for key in SCORES] for row in found.rows])
        scores = {f"score/{row.task}/{row.scoring}/{row.model}": row.score for row in found.rows}
        gaps = {f"gap/{gap.task}/{gap.scoring}": gap.gap for gap in found.gaps}
        html = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        self.run.log({"evaluation": table, "report": html} | numbers | scores | gaps)

    def close(self) -> None:
        """End the W&B run of the current stage."""
        if self.run:
            self.run.finish()
        self.run = None


def _shown(found: Any) -> Any:
    """Replace half surrogates by escapes: W&B takes no path that is not UTF-8."""
    if isinstance(found, dict):
        return {_shown(key): _shown(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_shown(value) for value in found]
    return visible(found, keep="\n\t") if isinstance(found, str) else found


def _plain(name: str) -> str:
    """Make a name fit for an address: W&B takes no other ids, kinds of job and aliases. Names stay different."""
    plain = re.sub(r"[^\w ,.-]+", "-", short(name, TAG), flags=re.ASCII).strip() or "-"
    return (
        plain
        if plain == name
        else f"{plain[: TAG - 7]}-{hashlib.sha256(name.encode(errors='backslashreplace')).hexdigest()[:6]}"
    )


LATER = "offline runs can be uploaded later with `wandb sync`"


def is_reachable() -> bool:
    """Whether the W&B server answers."""
    return answers(_server())


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_key() -> bool:
    """Whether W&B would find credentials without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(_server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
