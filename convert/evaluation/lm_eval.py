"""Public tasks by EleutherAI's lm-evaluation-harness, on our model objects and by its own evaluator.

Tasks that the harness scores by log probability count as "likelihood", those for which a model writes as "generation".
"""

import difflib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.network import hub_offline, is_hub_reachable
from convert.core.places import cache_folder
from convert.data.prompts import has_chat_template
from convert.evaluation.generation import plain_settings
from convert.models.saving import fingerprint
from convert.runs.evaluation_schemas import LmEvalScore
from convert.runs.keys import Scoring

BATCH = 16


def _lm_eval() -> tuple[ModuleType, ModuleType]:
    """The harness and yaml, which are extras."""
    try:
        import lm_eval
        import yaml
    except ImportError:
        raise UserError("Tasks of lm-evaluation-harness need its package: pip install -e '.[eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval, yaml


def find(names: str) -> tuple[list[str], Any]:
    """Find the tasks that these names and folders stand for, and the harness's TaskManager; wrong names are
    refused."""
    _, yaml = _lm_eval()
    from lm_eval.tasks import TaskManager

    chosen = [name for name in names.split(",") if name]
    folders = [Path(name) for name in chosen if Path(name).is_dir()]
    tasks = [task for folder in folders for task in local_tasks(folder, yaml)]
    others = [name for name in chosen if Path(name) not in folders]
    places = [str(folder.resolve()) for folder in folders]
    manager = TaskManager(include_path=places or None, include_defaults=bool(others))  # its own take seconds to find
    for name in others:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
            offer = f"Nearest: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them."
            raise UserError(f"lm-evaluation-harness has no task {name!r}, and there is no folder of that name. {offer}")
        tasks.append(name)
    return tasks, manager


def run_harness(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    names: str,
    *,
    limit: int | None = None,
    chat: bool = True,
) -> list[LmEvalScore]:
    """Score models by the harness. `names` are its tasks or groups, or folders of local tasks (YAML and JSONL), with
    commas. With `chat` an instruct model is prompted in its chat template. Answers are kept as they come, so an
    evaluation that was stopped goes on."""
    lm_eval, _ = _lm_eval()
    from lm_eval.models.huggingface import HFLM

    tasks, manager = find(names)
    rows: list[LmEvalScore] = []
    templated = chat and has_chat_template(tokenizer)
    for model_name, model in models.items():
        # not in the run's folder: it is a pickle, and folders are handed on
        answers = cache_folder() / "lm-eval" / fingerprint(model)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, enable_thinking=False)
        with plain_settings(model):
            done = _evaluate(lm_eval, wrapped, tasks, manager, limit, templated, str(answers))
        rows += _rows(model_name, done)
    return sorted(rows, key=lambda row: (row.task, row.metric))


def _evaluate(
    lm_eval: ModuleType, model: Any, tasks: list[str], manager: Any, limit: int | None, templated: bool, answers: str
) -> dict[str, Any]:
    """Results of the harness's evaluator; what a task does wrong is a UserError."""
    import datasets

    unreachable = not is_hub_reachable()
    try:
        with hub_offline(datasets.config, when=unreachable):
            return lm_eval.simple_evaluate(
                model=model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000,
                apply_chat_template=templated, use_cache=answers,
            )  # fmt: skip
    except UserError:
        raise
    except (OSError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "the local cache lacks it and the hub gives no answer" if unreachable else reason
        raise UserError(
            f"The data of {', '.join(tasks)} could not be read ({reason}). Without network give a folder of local"
            " tasks."
        ) from None
    except Exception as error:  # whatever a task's file makes it do
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"lm-evaluation-harness could not do {', '.join(tasks)} ({reason}). Mend the tasks' files, or leave them"
            " out."
        ) from error


def _rows(model: str, done: dict[str, Any]) -> list[LmEvalScore]:
    """The harness's results of one model as our rows."""
    rows = []
    for task, metrics in done["results"].items():
        config = done["configs"].get(task)
        if config is None:  # a group: its tasks have rows of their own
            continue
        scoring: Scoring = "generation" if config["output_type"].startswith("generate") else "likelihood"
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                LmEvalScore(
                    task=task,
                    model=model,
                    scoring=scoring,
                    metric=metric if kind == "none" else f"{metric}, {kind}",
                    score=float(value),
                    error=error if isinstance(error, int | float) else None,
                    n=done["n-samples"][task]["effective"],
                )
            )
    return rows


def local_tasks(folder: Path, yaml: ModuleType) -> list[str]:
    """Names of the tasks that the YAML files of a folder define. What does not parse is said with file and line."""

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        """Reads YAML with tags of the harness, such as !function, which are left alone."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    found = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            config = yaml.load(_read(file), Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}, line {mark.line + 1}" if mark else str(file)
            raise UserError(
                f"A task's file must be YAML; {where} is not: {getattr(error, 'problem', error)}."
            ) from None
        if isinstance(config, dict) and isinstance(config.get("task"), str):
            found.append(config["task"])
    for file in sorted(folder.rglob("*.jsonl")):
        lines = _read(file).rstrip("\n").split("\n")  # at no other line breaks: a string may hold them
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"Every line of a task's data must be JSON; {file}, line {number} is not: {error}."
                ) from None
    if not found:
        raise UserError(f"A folder of local tasks has YAML files with `task: NAME`; {folder} has none.")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"A task's files must be UTF-8; {file}, line {line} is not.") from None
