"""Does lm-evaluation-harness give the scores that our scoring methods give, on the same examples?

    python -m experiments.lm_eval_parity smollm2-135m --tasks sums,facts,forms,names

Our tasks are written as a folder of local tasks (YAML and JSONL, one task for each scoring method; answers are parsed
by our function), which `python -m convert.evaluate MODEL --lm-eval FOLDER` takes too."""

import argparse
import json
from pathlib import Path

from rich.table import Table

from convert.cli import fail_in_words, whole_number
from convert.core.console import Console
from convert.core.files import write_text
from convert.evaluation.lm_eval import run_harness
from convert.evaluation.runner import chosen, evaluate_tasks
from convert.evaluation.tasks import Task
from convert.models.loading import load_teacher

LIKELIHOOD = """\
task: {name}_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATION = """\
task: {name}_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {{until: [], max_gen_toks: {tokens}, do_sample: false}}
process_results: !function answers.{name}
metric_list: [{{metric: exact_match}}]
"""
ANSWERS = """\
from convert.evaluation.scoring import cut
from convert.evaluation.tasks import TASKS


def scored(name):
    task = TASKS[name]
    return lambda doc, results: {"exact_match": float(task.parse(cut(results[0], task.stop)) == doc["answer"])}


"""


def write_local_tasks(tasks: list[Task], folder: Path, limit: int, seed: int = 0) -> None:
    """Two tasks of lm-evaluation-harness for each of ours: NAME_generation and NAME_likelihood."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.py").write_text(
        ANSWERS + "".join(f'{task.name} = scored("{task.name}")\n' for task in tasks), encoding="utf-8"
    )
    for task in tasks:
        data = (folder / f"{task.name}.jsonl").resolve()
        rows = [
            {"prompt": i.prompt, "answer": i.answer, "choices": list(i.choices), "gold": i.gold}
            for i in task.items(limit, seed)
        ]
        write_text(data, "".join(json.dumps(row) + "\n" for row in rows))
        for scoring, text in (("likelihood", LIKELIHOOD), ("generation", GENERATION)):
            (folder / f"{task.name}_{scoring}.yaml").write_text(
                text.format(name=task.name, data=data, tokens=task.max_new_tokens), encoding="utf-8"
            )


def compare(model: str, tasks: str | None, limit: int, folder: Path) -> list[tuple[str, str, float, float]]:
    """Rows of task, scoring method, our score, and the harness's."""
    loaded = load_teacher(model)
    selected = chosen(tasks, loaded.tokenizer)
    found: list[tuple[str, str, float, float]] = []
    for chat in {task.chat for task in selected}:  # the harness uses the template for all tasks of a call, or for none
        some = [task for task in selected if task.chat is chat]
        write_local_tasks(some, folder / ("chat" if chat else "plain"), limit)
        ours = evaluate_tasks({"teacher": loaded.model}, loaded.tokenizer, some, limit=limit).rows
        rows = run_harness(
            {"teacher": loaded.model}, loaded.tokenizer, str(folder / ("chat" if chat else "plain")), chat=chat
        )
        theirs = {row.task: row.score for row in rows}
        found += [(row.task, row.scoring, row.score, theirs[f"{row.task}_{row.scoring}"]) for row in ours]
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tasks")
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=48)
    parser.add_argument("--out", type=Path, default=Path("runs/lm-eval-parity"))
    args = parser.parse_args()
    table = Table("task", "scoring", "ours", "lm-evaluation-harness", "", title=args.model, title_justify="left")
    for task, scoring, ours, theirs in compare(args.model, args.tasks, args.limit, args.out):
        table.add_row(
            task, scoring, f"{ours:.6f}", f"{theirs:.6f}", "same" if abs(ours - theirs) < 1e-12 else "DIFFERENT"
        )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
