"""The options that describe a recipe, for the commands that need one: convert.run and convert.teach."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.cli import Parser, heavy_imports, number_of_tokens, whole_number
from convert.core.errors import UserError
from convert.data.corpus import check_exists
from convert.models.catalog import Source, domain_name, resolve
from convert.recipes.assignment import parse_assignment
from convert.recipes.targets import TARGETS, default_recipe, target_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from convert.domains.base import Domain
    from convert.recipes.base import Recipe


@dataclass(frozen=True)
class Asked:
    """What the options ask for: a recipe for a teacher of a domain. `data` is what is trained on."""

    domain: Domain
    source: Source
    config: PreTrainedConfig
    recipe: Recipe
    data: str


def add_recipe_options(parser: Parser, default_target: str | None = None) -> None:
    """Add the options to a command; without a default the target must be given."""
    parser.add_argument(
        "teacher",
        help="an alias (neox-nano, pythia-1b, vit-nano, ...), a hub id, a local folder, a run folder or a .gguf file",
    )
    parser.add_argument(
        "--to",
        required=default_target is None,
        default=default_target,
        metavar="TARGET",
        help="; ".join(f"{name}: {target.about}" for name, target in TARGETS.items()),
    )
    parser.add_argument(
        "--data",
        help="text: stdlib, a file or folder, hub:NAME[:CONFIG], or stream:NAME[:CONFIG], which is read while the run"
        " trains; images: digits, fashion-mnist, a folder with a folder for each class, or hub:NAME[:CONFIG]; the"
        " default depends on the teacher",
    )
    parser.add_argument("--tokens", help="text: in all training steps together: 20000, 500k, 12M, 1B")
    parser.add_argument("--seq-len", type=whole_number(2, 2**24), help="text: tokens in a training sequence")
    parser.add_argument("--batch-tokens", type=whole_number(2, 2**27), help="text: tokens in a training step")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default the best one here")
    parser.add_argument(
        "--share-teacher",
        choices=("auto", "always", "never"),
        default="auto",
        help="under torchrun: share the teacher out among the processes, or let each hold it whole; auto: where it does"
        " not fit each",
    )
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what would happen and what it would cost; nothing is downloaded, trained or written",
    )
    parser.add_argument("--tiny", action="store_true", help="shrink the recipe to seconds, on the same path")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STEP.FIELD=VALUE",
        dest="settings",
        help="any option of any step; --plan shows the steps",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code, and read pickles, that come with the teacher"
    )


def asked(args: argparse.Namespace) -> Asked:
    """The recipe that the options describe; refuses at once what needs no model to refuse."""
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
    recipe = recipes.tiny(recipe) if args.tiny else recipe
    for assignment in args.settings:
        recipe = recipes.with_setting(recipe, assignment)
    return Asked(domain, source, config, recipe, source.data if args.data is None else args.data)


def _sizes(args: argparse.Namespace, domain: str) -> dict[str, Any]:
    """The sizes that were given. Raises UserError for one of another domain."""
    of = {"language": ("tokens", "seq_len", "batch_tokens"), "vision": ("images", "labels")}
    given = {name: value for names in of.values() for name in names if (value := getattr(args, name, None)) is not None}
    for name in given:
        if name not in of[domain]:
            kind, other = ("images", "text") if domain == "vision" else ("text", "images")
            options = ", ".join("--" + known.replace("_", "-") for known in of[domain])
            raise UserError(
                f"--{name.replace('_', '-')} is an option of {other}, and {args.to} learns from {kind}. Those of {kind}"
                f" are {options}."
            )
    return {name: number_of_tokens(v) if name in ("tokens", "images") else v for name, v in given.items()}
