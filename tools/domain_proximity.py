#!/usr/bin/env python3
"""Say how close domains are: the overlap of their most frequent words in %, stop words left out."""

import argparse
import sys

from ki_ds.cli import ends_cleanly
from ki_ds.data.proximity import TOP, domain_words, proximity_table, sources_of_domains


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "domains",
        nargs="+",
        metavar="NAME=SOURCE",
        help="a domain and its text: a source as tools/prepare_data.py --input takes it; "
        "the same name again adds to it",
    )
    parser.add_argument("--top", type=int, default=TOP, help=f"most frequent words of each domain ({TOP})")
    parser.add_argument(
        "--num_words", type=int, help="draw lines with about so many running words from each domain (all of its text)"
    )
    args = parser.parse_args()
    domains = [
        domain_words(name, sources, top=args.top, num_words=args.num_words)
        for name, sources in sources_of_domains(args.domains).items()
    ]
    print(proximity_table(domains))


if __name__ == "__main__":
    sys.exit(main())
