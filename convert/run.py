"""The command that converts a teacher.

python -m convert.run neox-nano --to mamba
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from convert.cli import Parser, heavy_imports, main_of, number_of_tokens, real_number, whole_number
from convert.core.console import console
from convert.core.errors import UserError
from convert.core.processes import joined
from convert.data.corpus import check_exists
from convert.models.catalog import Source, domain_name, resolve
from convert.recipes.assignment import parse_assignment
from convert.recipes.targets import TARGETS, default_recipe, target_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from convert.domains.base import Domain
    from convert.recipes.base import Recipe


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.run", description="Convert a trained Transformer into a cheaper architecture."
    )
    parser.add_argument(
        "teacher",
        help="an alias (neox-nano, pythia-1b, vit-nano, ...), a hub id, a local folder, a run folder or a .gguf file",
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="TARGET",
        help="; ".join(f"{name}: {target.about}" for name, target in TARGETS.items()),
    )
    parser.add_argument("--out", help="the run folder; default runs/TEACHER-TARGET")
    parser.add_argument(
        "--data",
        help="text: stdlib, a file or folder, or hub:NAME[:CONFIG]; images: digits, fashion-mnist, a folder with a"
        " folder for each class, or hub:NAME[:CONFIG]; the default depends on the teacher",
    )
    parser.add_argument("--tokens", help="text: in all training steps together: 20000, 500k, 12M, 1B")
    parser.add_argument("--seq-len", type=whole_number(2, 2**24), help="text: tokens in a training sequence")
    parser.add_argument("--batch-tokens", type=whole_number(2, 2**27), help="text: tokens in a training step")
    parser.add_argument("--images", help="images: seen in training, each as often as it comes round: 60000, 2M")
    parser.add_argument(
        "--labels", type=real_number(1e-6, 1), help="images: share whose label may be used, of each class; default 1"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default the best one here")
    parser.add_argument("--tasks", help="with commas: only these at the end, of those that convert.evaluate takes")
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what would happen and what it would cost; nothing is downloaded or trained",
    )
    parser.add_argument("--tiny", action="store_true", help="shrink the recipe to seconds, on the same path")
    parser.add_argument("--fresh", action="store_true", help="move an old run aside and start anew")
    parser.add_argument(
        "--wandb",
        choices=("online", "offline", "disabled"),
        help="default: online where a key is configured, else offline",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STEP.FIELD=VALUE",
        dest="settings",
        help="any option of any step; --plan shows the steps",
    )
    parser.add_argument(
        "--stop-when",
        action="append",
        default=[],
        metavar="RULE",
        help="as generation<0.2: of perplexity, generation, generation_gap, whenever a stage measures; may be repeated",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code, and read pickles, that come with the teacher"
    )
    return main_of(parser, convert, argv, around=joined)


def convert(args: argparse.Namespace) -> None:
    """Refuse at once what needs no model to refuse; then plan, or run the whole conversion."""
    source, target = resolve(args.teacher), target_named(args.to)
    domain_name(source, target.domain)
    sizes = _sizes(args, target.domain)
    if args.tiny and sizes:
        raise UserError(
            f"--tiny chooses the sizes itself; leave out {', '.join('--' + name.replace('_', '-') for name in sizes)}."
        )
    if args.data is not None and target.domain == "language":
        check_exists(args.data)
    for assignment in args.settings:
        parse_assignment(assignment)
    with heavy_imports():
        from convert import recipes
        from convert.domains import domain_of

    domain = domain_of(args.teacher, target.domain)
    source = domain.resolve(args.teacher)
    config = domain.read_config(source, args.trust_remote_code)
    recipe = default_recipe(source.name, config, args.to, seed=args.seed, **sizes)
    recipe = dataclasses.replace(recipes.tiny(recipe) if args.tiny else recipe, tasks=args.tasks)
    for assignment in args.settings:
        recipe = recipes.with_setting(recipe, assignment)
    if args.plan:
        _plan(args, domain, source, config, recipe)
        return
    with heavy_imports():
        from convert.pipeline import run_recipe

    out = f"runs/{source.name}-{args.to}" + ("-tiny" if args.tiny else "") if args.out is None else args.out
    run_recipe(
        args.teacher, recipe, out, data=args.data, device=args.device, fresh=args.fresh, wandb=args.wandb,
        stop_when=args.stop_when, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip


def _sizes(args: argparse.Namespace, domain: str) -> dict[str, Any]:
    """The sizes that were given. Raises UserError for one of another domain."""
    of = {"language": ("tokens", "seq_len", "batch_tokens"), "vision": ("images", "labels")}
    given = {name: getattr(args, name) for names in of.values() for name in names if getattr(args, name) is not None}
    for name in given:
        if name not in of[domain]:
            kind, other = ("images", "text") if domain == "vision" else ("text", "images")
            options = ", ".join("--" + known.replace("_", "-") for known in of[domain])
            raise UserError(
                f"--{name.replace('_', '-')} is an option of {other}, and {args.to} learns from {kind}. Those of {kind}"
                f" are {options}."
            )
    return {name: number_of_tokens(v) if name in ("tokens", "images") else v for name, v in given.items()}


def _plan(args: argparse.Namespace, domain: Domain, source: Source, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Print the plan; raises UserError with its first refusal, if there is one."""
    with heavy_imports():
        from convert.models.devices import pick_device
        from convert.planning import plan as planning
        from convert.planning.validate import named_corpora, named_teachers

    data = source.data if args.data is None else args.data
    named_corpora(domain, recipe, data)  # refuses a folder without text
    teachers = named_teachers(domain, recipe, args.trust_remote_code)
    device = pick_device(args.device)
    plan = planning.make_plan(domain, source.name, config, recipe, data, device, teachers)
    planning.show(plan, console)
    if plan.refusals:
        raise UserError(plan.refusals[0])


if __name__ == "__main__":
    raise SystemExit(main())
