"""Which of several conversions is the better one, and at what cost? One page shows several runs side by side.

python -m experiments.compare runs/neox-nano-mamba runs/neox-nano-mla --out runs/compare.html
"""

import argparse
from pathlib import Path

from convert.cli import fail_in_words
from convert.core.console import console
from convert.core.errors import UserError
from convert.reports.language import LANGUAGE
from convert.reports.page import write_page
from convert.reports.vision import VISION
from convert.runs import records

SECTIONS = {"language": LANGUAGE, "vision": VISION}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"))
    args = parser.parse_args()
    domain, *others = dict.fromkeys(records.report(run).domain for run in args.runs)
    if others:
        raise UserError(
            f"A page compares runs of one kind; these are of {domain} and of {others[0]}. Give those of one kind."
        )
    write_page(args.runs, args.out, SECTIONS[domain])
    console.print(f"{args.out} is one file; open it in a browser.")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
