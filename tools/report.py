#!/usr/bin/env python3
"""Compare finished runs: savings at equal perplexity as a table, a CSV, curves and one HTML page."""

import argparse
import sys

from rich.console import Console

from ki_ds.errors import ends_cleanly
from ki_ds.report import text_table, write_report


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or LABEL=FOLDER to name its arm")
    parser.add_argument("--out", default="report.html", help="the page; .png and .csv are written beside it")
    parser.add_argument("--allow_unfinished", action="store_true", help="take runs before their last step")
    args = parser.parse_args()
    comparison = write_report(args.runs, args.out, allow_unfinished=args.allow_unfinished)
    print(f"wrote {args.out} and the same with .png and .csv")
    Console().print(text_table(comparison))


if __name__ == "__main__":
    sys.exit(main())
