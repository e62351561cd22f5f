"""The command that asks teacher and student the same examples, by generation and by likelihood, and measures a run's
final numbers again.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import argparse

from convert.cli import Parser, heavy_imports, main_of
from convert.core.places import path_of
from convert.evaluation.tasks import HUMANEVAL, TASKS
from convert.evaluation.tasks.base import LIMIT


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.evaluate",
        description="Teacher and student on the same examples, by generation and by likelihood.",
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("--tasks", help=f"only these, with commas: {', '.join([*TASKS, HUMANEVAL.name])}")
    parser.add_argument(
        "--limit", type=int, help=f"examples of each task; default {LIMIT}, and all of a task of lm-evaluation-harness"
    )
    parser.add_argument(
        "--lm-eval", metavar="NAMES", help="tasks of lm-evaluation-harness, or folders of such, with commas"
    )
    parser.add_argument("--out", help="where evaluation.json goes; default the run folder, or runs/evaluation-NAME")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default the best one here")
    parser.add_argument(
        "--execute-code", action="store_true", help=f"programs that models write for {HUMANEVAL.name} may run here"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="as for the run, if its teacher needed it")
    return main_of(parser, evaluate, argv)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate the folder, and write a run's page again."""
    run = path_of(args.folder, "The folder")
    has_page = (run / "report.json").exists() and path_of(args.out or run, "--out") == run
    with heavy_imports():
        from convert.evaluation.runner import evaluate_model, evaluate_run, is_run
        from convert.reports.language import LANGUAGE
        from convert.reports.page import write_report_page
        from convert.reports.sections import Run

    if has_page:
        Run.read(run)  # what cannot be shown is said before minutes of evaluation
    evaluated = evaluate_run if is_run(run) else evaluate_model
    evaluated(
        args.folder,
        tasks=args.tasks,
        limit=args.limit,
        lm_eval=args.lm_eval,
        out=args.out,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        execute_code=args.execute_code,
    )
    if has_page:
        write_report_page(run, LANGUAGE)


if __name__ == "__main__":
    raise SystemExit(main())
