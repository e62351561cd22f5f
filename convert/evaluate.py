"""The final measurements of a run again.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import argparse

from convert.errors import quick_to_stop

with quick_to_stop(__name__ == "__main__"):
    from convert.conversion import evaluate
    from convert.run import fail_in_words


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.evaluate", description="Repeat the final measurements of a run.")
    parser.add_argument("folder", help="a run folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="as for the run, if its teacher needed it")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    args = parser.parse_args(argv)
    return fail_in_words(lambda: evaluate(args.folder, device=args.device, trust_remote_code=args.trust_remote_code), args.debug)


if __name__ == "__main__":
    raise SystemExit(main())
