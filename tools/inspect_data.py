#!/usr/bin/env python3
"""Say what token stores are: kind, counts, lengths, sample text, and whether their files are unchanged."""

import argparse
import json
import sys

from ki_ds.cli import ends_cleanly
from ki_ds.data.describe import inspect


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "path",
        metavar="PREFIX|FOLDER",
        help="prefix of PREFIX.bin and PREFIX.idx (Megatron or fairseq mmap, with fairseq's numbered shards), a quoted "
        "glob of Megatron prefixes, or a folder whose splits are all told: a prepared corpus or fairseq's data-bin",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder to show text with (for fairseq data: GPT-2's)")
    parser.add_argument("--num_samples", type=int, default=3, help="number of items to show")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the hashes")
    parser.add_argument("--json", action="store_true", help="a JSON list with one object for each split")
    args = parser.parse_args()
    splits = inspect(args.path, tokenizer=args.tokenizer, num_samples=args.num_samples, verify=not args.no_verify)
    if args.json:
        print(json.dumps([facts.to_dict() for facts in splits], indent=2, ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(facts.lines()) for facts in splits))


if __name__ == "__main__":
    sys.exit(main())
