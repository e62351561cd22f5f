"""The command that records what a teacher says of the tokens of a training step, once, for many students.

python -m convert.teach neox-nano --top-k 64
python -m convert.run neox-nano --to mamba --set distill.teacher=cache:runs/neox-nano-teacher
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from typing import TYPE_CHECKING

from convert.cli import Parser, heavy_imports, main_of, whole_number
from convert.core.console import console, count, size
from convert.core.errors import UserError
from convert.core.places import path_of
from convert.core.processes import gathered, joined, on_first
from convert.recipe_options import Asked, add_recipe_options, asked

if TYPE_CHECKING:
    from convert.data.recorded import Recording
    from convert.steps.base import Step

TOP_K = 64  # of which the probabilities are kept, where nothing else is asked for (ours)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="python -m convert.teach",
        description="Record the teacher's probabilities of the tokens that a step of convert.run trains on. Options are"
        " those of the run that will use it with --set STEP.teacher=cache:FOLDER; any target whose step has the same"
        " batches fits, and no more of them.",
    )
    add_recipe_options(parser, default_target="mamba")
    parser.add_argument("--step", default="distill", help="the step of the recipe; default distill")
    parser.add_argument("--out", help="the folder; default runs/TEACHER-teacher")
    parser.add_argument(
        "--top-k",
        type=whole_number(0, 2**24),
        help=f"most likely tokens that are kept with their probabilities; default {TOP_K}, and 0 with --sample",
    )
    parser.add_argument(
        "--sample",
        type=whole_number(0, 2**24),
        default=0,
        help="tokens drawn from all others, which makes the loss right in the mean; default 0: all others are one",
    )
    return main_of(parser, teach, argv, around=joined)


def teach(args: argparse.Namespace) -> None:
    """Refuse what cannot be recorded, say how large it will be, and record."""
    found = asked(args)
    if found.domain.name != "language":
        raise UserError(f"What a teacher says is recorded of text; {args.teacher} is a classifier of images.")
    with heavy_imports():
        from convert.data.recorded import Recording
        from convert.models.devices import pick_device
        from convert.planning.plan import shares_to_ask
        from convert.planning.validate import named_corpora
        from convert.runs.ledger import locked
        from convert.steps import recorded

    domain, recipe = found.domain, found.recipe
    step, settings = recorded.step_to_record(recipe.steps, args.step)
    _check(found, step, args.trust_remote_code)
    kept = _kept(args, domain.outline(found.config)[0].vocab_size)
    corpora = named_corpora(domain, recipe, found.data)
    device = pick_device(args.device)
    name = f"runs/{found.source.name}-teacher" + ("-tiny" if args.tiny else "")
    out = path_of(name if args.out is None else args.out, "--out")
    _tell_size(Recording(out, recorded.about({}, settings, kept)))
    # machines may differ
    shares = any(gathered(shares_to_ask(domain, found.config, device, args.share_teacher)))
    if shares:
        console.print("The processes share the teacher out.")
    if args.plan:
        return
    teacher = domain.load_teacher(found.source, device, args.trust_remote_code, shares)
    own, units = (found.data, recipe.units) if step.own_data is None else (step.own_data, settings.units)
    like = recipe.measured_by if step.own_data is None else settings
    data = domain.prepare(corpora[own], teacher, units, like)
    batches = domain.batches(data, settings)
    recording = Recording(out, recorded.about(domain.origins(teacher, data), settings, kept))
    with ExitStack() as held:

        def take() -> None:
            recording.check()
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            recording.begin()

        on_first(take)
        recorded.record(recording, teacher.model, batches, settings)
    console.print(
        f"{out} has what {found.source.name} says of {count(settings.num_steps * settings.batch_tokens)} tokens. Learn"
        f" from it:  --set {args.step}.teacher={recorded.PREFIX}{out}"
    )


def _check(found: Asked, step: Step, trust_remote_code: bool) -> None:
    """Raise UserError for a step that cannot be done."""
    from convert.planning.validate import named_teachers, outline

    recipe = found.recipe
    at = outline(found.domain, found.config, recipe, named_teachers(found.domain, recipe, trust_remote_code))
    for before in recipe.steps[: recipe.steps.index(step)]:
        at = before.after(at)
    if reasons := step.problems(at):
        raise UserError(reasons[0])


def _kept(args: argparse.Namespace, vocab_size: int) -> dict[str, int]:
    """How much of each distribution is kept."""
    top_k = min(TOP_K, vocab_size) * (not args.sample) if args.top_k is None else args.top_k
    if not top_k + args.sample:
        raise UserError("A recording keeps something of each token; --top-k and --sample are both 0. Raise one.")
    if top_k > vocab_size - bool(args.sample):
        raise UserError(
            f"--top-k counts tokens of the vocabulary, and --sample draws from the others; there are {vocab_size:,},"
            f" and --top-k is {top_k:,}. Give a smaller one."
        )
    return {"vocab_size": vocab_size, "top_k": top_k, "sample": args.sample}


def _tell_size(recording: Recording) -> None:
    """Print how large the recording will be. Raises UserError where its disk has less room."""
    folder, most = recording.folder.absolute(), recording.most_bytes()
    tokens = most // recording.record.itemsize
    console.print(
        f"{size(most)} at most: {recording.record.itemsize} bytes for each of {count(tokens)} tokens, in {folder}",
        highlight=False,
    )
    there = next(place for place in (folder, *folder.parents) if place.exists())
    left = most - sum(file.stat().st_size for file in (folder / "parts").glob("*.npy"))
    if (free := shutil.disk_usage(there).free) < left:
        raise UserError(
            f"The recording needs about {size(left)} more on disk; {there} has {size(free)} free. Free some, or give"
            " --out elsewhere, a smaller --top-k, or fewer --tokens."
        )


if __name__ == "__main__":
    raise SystemExit(main())
