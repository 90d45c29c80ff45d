#!/usr/bin/env python3
"""Compare finished runs, one section for each student size: savings at equal perplexity as tables, CSV, curves, a page.

All runs must have been measured on the same validation data with the same masks and tokenizer (docs/reports.md).
"""

import argparse
import sys

from rich.console import Console

from ki_ds.cli import ends_cleanly
from ki_ds.reports.report import text_table, write_report


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or LABEL=FOLDER to name its arm")
    parser.add_argument("--out", default="report.html", help="the page; .png and .csv are written beside it")
    parser.add_argument("--title", help="of the page; by default it names the students' sizes")
    parser.add_argument("--allow_unfinished", action="store_true", help="take runs before their last step")
    args = parser.parse_args()
    sections = write_report(args.runs, args.out, title=args.title, allow_unfinished=args.allow_unfinished)
    print(f"wrote {args.out} and the same with .png and .csv")
    Console(width=None if sys.stdout.isatty() else 160).print(text_table(sections))


if __name__ == "__main__":
    sys.exit(main())
