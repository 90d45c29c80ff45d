#!/usr/bin/env python3
"""Say what a token store is: kind, counts, sample text, and whether its files are unchanged."""

import argparse
import sys

from ki_ds.data.describe import describe_store
from ki_ds.errors import ends_cleanly


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", help="PREFIX of PREFIX.bin and PREFIX.idx, Megatron or fairseq mmap")
    parser.add_argument("--tokenizer", help="tokenizer folder to show text with (for fairseq data: GPT-2's)")
    parser.add_argument("--num_samples", type=int, default=3, help="number of items to show")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the hashes")
    args = parser.parse_args()
    lines = describe_store(
        args.prefix, tokenizer=args.tokenizer, num_samples=args.num_samples, verify=not args.no_verify
    )
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
