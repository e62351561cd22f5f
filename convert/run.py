"""The command that converts a teacher.

python -m convert.run neox-nano --to mamba
"""

from __future__ import annotations

import argparse
import dataclasses

from convert.cli import Parser, heavy_imports, main_of, real_number
from convert.core.console import console
from convert.core.processes import joined
from convert.recipe_options import Asked, add_recipe_options, asked


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.run", description="Convert a trained Transformer into a cheaper architecture."
    )
    add_recipe_options(parser)
    parser.add_argument("--out", help="the run folder; default runs/TEACHER-TARGET")
    parser.add_argument("--images", help="images: seen in training, each as often as it comes round: 60000, 2M")
    parser.add_argument(
        "--labels", type=real_number(1e-6, 1), help="images: share whose label may be used, of each class; default 1"
    )
    parser.add_argument("--tasks", help="with commas: only these at the end, of those that convert.evaluate takes")
    parser.add_argument("--fresh", action="store_true", help="move an old run aside and start anew")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        help="default: online where a key is configured, else offline",
    )
    parser.add_argument(
        "--stop-when",
        action="append",
        default=[],
        metavar="RULE",
        help="as generation<0.2: of perplexity, generation, generation_gap, whenever a stage measures; may be repeated",
    )
    return main_of(parser, convert, argv, around=joined)


def convert(args: argparse.Namespace) -> None:
    """Refuse at once what needs no model to refuse; then plan, or run the whole conversion."""
    found = asked(args)
    found = dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, tasks=args.tasks))
    if args.plan:
        _plan(args, found)
        return
    with heavy_imports():
        from convert.pipeline import run_recipe

    out = f"runs/{found.source.name}-{args.to}" + ("-tiny" if args.tiny else "") if args.out is None else args.out
    run_recipe(
        args.teacher, found.recipe, out, data=args.data, device=args.device,
        fresh=args.fresh, wandb=args.wandb, stop_when=args.stop_when, trust_remote_code=args.trust_remote_code,
        share_teacher=args.share_teacher,
    )  # fmt: skip


def _plan(args: argparse.Namespace, found: Asked) -> None:
    """Print the plan. Raises UserError where it cannot work."""
    with heavy_imports():
        from convert.models.devices import pick_device
        from convert.planning import plan as planning
        from convert.planning.validate import named_corpora, named_teachers

    domain, recipe = found.domain, found.recipe
    named_corpora(domain, recipe, found.data)  # refuses a folder without text
    teachers = named_teachers(domain, recipe, args.trust_remote_code)
    device = pick_device(args.device)
    plan = planning.make_plan(
        domain, found.source.name, found.config, recipe, found.data, device, teachers, args.share_teacher
    )
    planning.show(plan, console)


if __name__ == "__main__":
    raise SystemExit(main())
