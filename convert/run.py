"""The command.

python -m convert.run neox-nano --to mamba
"""

import argparse
import os
import sys
import traceback

from convert.core.errors import Interrupted, UserError, files_in_words, quick_to_stop

with quick_to_stop(__name__ == "__main__"):
    from convert import recipes
    from convert.cli import number_of_tokens
    from convert.core.console import console, visible
    from convert.core.places import cache_folder
    from convert.data.corpus import corpus
    from convert.models.catalog import resolve
    from convert.models.devices import pick_device
    from convert.models.loading import read_config
    from convert.pipeline import default_recipe, run_recipe
    from convert.planning import plan as planning


def fail_in_words(work, debug: bool) -> int:
    """Run `work`; the exit code is 0, 2 for the user's mistakes, 1 for ours, 130 when stopped by the user, 141 when
    nobody reads on."""
    try:
        with files_in_words():
            cache_folder()  # one that cannot be is said before anything is done
            work()
        return 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Stopped at once; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python itself complains while it ends
        return 141
    except Exception as error:
        if debug or os.environ.get("CONVERT_DEBUG"):
            traceback.print_exc()
        if isinstance(error, UserError):
            print(f"error: {visible(str(error))}", file=sys.stderr)
            return 2
        what = visible(f"{type(error).__name__}: {error}", keep="\n\t")
        print(
            f"error: This is a defect of ours: {what} (CONVERT_DEBUG=1 before the command shows where)", file=sys.stderr
        )
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.run", description="Convert a trained Transformer into a cheaper architecture."
    )
    parser.add_argument(
        "teacher", help="an alias (neox-nano, pythia-1b, ...), a hub id, a local folder, a run folder or a .gguf file"
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help=f"one of {', '.join(recipes.RECIPES)}")
    parser.add_argument("--out", help="the run folder; default runs/TEACHER-TARGET")
    parser.add_argument(
        "--data", help="stdlib, a file or folder of text, or hub:NAME[:CONFIG]; the default depends on the teacher"
    )
    parser.add_argument("--tokens", help="in all training steps together: 20000, 500k, 12M, 1B")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default the best one here")
    parser.add_argument("--seed", type=int, default=0)
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
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    args = parser.parse_args(argv)

    def work() -> None:
        source = resolve(args.teacher)
        config = read_config(source, trust_remote_code=args.trust_remote_code)
        tokens = None if args.tokens is None else number_of_tokens(args.tokens)
        if args.tiny and any(size is not None for size in (tokens, args.seq_len, args.batch_tokens)):
            raise UserError("--tiny chooses the sizes itself; leave out --tokens, --seq-len and --batch-tokens.")
        recipe = default_recipe(
            source, config, args.to, tokens=tokens, seq_len=args.seq_len, batch_tokens=args.batch_tokens, seed=args.seed
        )
        recipe = recipes.tiny(recipe) if args.tiny else recipe
        for assignment in args.settings:
            recipe = recipes.with_setting(recipe, assignment)
        if args.plan:
            text = corpus(source.data if args.data is None else args.data)  # refuses what does not exist
            plan = planning.make_plan(source.name, config, recipe, text.spec, pick_device(args.device))
            planning.show(plan, console)
            if plan.refusals:
                raise UserError(plan.refusals[0])
            return
        out = f"runs/{source.name}-{args.to}" + ("-tiny" if args.tiny else "") if args.out is None else args.out
        run_recipe(
            args.teacher, recipe, out, data=args.data, device=args.device, fresh=args.fresh, wandb=args.wandb,
            stop_when=args.stop_when, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip

    return fail_in_words(work, args.debug)


if __name__ == "__main__":
    raise SystemExit(main())
