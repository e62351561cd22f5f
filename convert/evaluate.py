"""Evaluate teacher and student on the same examples, by generation and by likelihood; and a run's final metrics again.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import argparse

from convert.core.errors import quick_to_stop

with quick_to_stop(__name__ == "__main__"):
    from convert.core.places import path_of
    from convert.evaluation.runner import LIMIT, evaluate_model, evaluate_run, is_run
    from convert.evaluation.tasks import TASKS
    from convert.reports.language import LANGUAGE
    from convert.reports.page import write_report_page
    from convert.reports.sections import Run
    from convert.run import fail_in_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.evaluate",
        description="Evaluate teacher and student on the same examples, by generation and by likelihood.",
    )
    parser.add_argument("folder", help="a run folder, or anything that convert.run takes as a teacher")
    parser.add_argument("--tasks", help=f"only these, with commas: {', '.join(TASKS)}")
    parser.add_argument(
        "--limit", type=int, help=f"examples of each task; default {LIMIT}, and all of a task of lm-evaluation-harness"
    )
    parser.add_argument(
        "--lm-eval", metavar="NAMES", help="tasks of lm-evaluation-harness, or folders of such, with commas"
    )
    parser.add_argument("--out", help="where evaluation.json goes; default the run folder, or runs/evaluation-NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="as for the run, if its teacher needed it")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    args = parser.parse_args(argv)

    def work() -> None:
        run = path_of(args.folder, "The folder")
        has_page = (run / "report.json").exists() and path_of(args.out or run, "--out") == run
        if has_page:
            Run.read(run)  # what cannot be shown is said before minutes of evaluation
        evaluate = evaluate_run if is_run(run) else evaluate_model
        evaluate(
            args.folder, tasks=args.tasks, limit=args.limit, lm_eval=args.lm_eval, out=args.out, device=args.device,
            trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
        if has_page:
            write_report_page(run, LANGUAGE)

    return fail_in_words(work, args.debug)


if __name__ == "__main__":
    raise SystemExit(main())
