#!/usr/bin/env python3
"""Turn text into a corpus folder: train and validation token stores, tokenizer, corpus.json."""

import argparse
import sys
from collections import Counter
from typing import get_args

from ki_ds.cli import ends_cleanly
from ki_ds.data.prepare import TokenizerSpec, build_store
from ki_ds.data.sources import printable
from ki_ds.data.tokenize import TokenizerKind
from ki_ds.errors import UserError


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, globs: .txt .json .jsonl .csv .xml [.gz .bz2 .xz .zst], .parquet .arrow; "
        "hf:NAME[:CONFIG][@SPLIT]",
    )
    parser.add_argument("--out", required=True, help="corpus folder to make")
    parser.add_argument("--tokenizer", help="Hugging Face tokenizer, folder or hub name; SentencePiece .model")
    parser.add_argument("--fairseq_dict", help="dict.txt that numbers the ids of --tokenizer, a GPT-2 folder")
    parser.add_argument("--train_tokenizer", action="store_true", help="train one on the corpus instead")
    parser.add_argument("--tokenizer_kind", choices=get_args(TokenizerKind), help="what to train (default bytebpe)")
    parser.add_argument("--vocab_size", type=int, help="ids of the tokenizer to train (default 50,265)")
    parser.add_argument("--num_workers", type=int, help="workers (default: one a core)")
    parser.add_argument("--valid_fraction", type=float, default=1 / 200, help="share of documents for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of validation documents")
    parser.add_argument("--text_key", default="text", help="key or column of the text in JSON, tables")
    parser.add_argument("--drop_duplicates", action="store_true", help="keep the first of documents with equal text")
    parser.add_argument("--pad_vocab_to", type=int, default=1, help="note the vocabulary rounded up to a multiple")
    parser.add_argument("--quiet", action="store_true", help="no table of what was found, no progress")
    args = parser.parse_args()
    if (args.tokenizer is None) != args.train_tokenizer:
        raise UserError("--tokenizer and --train_tokenizer: exactly one of them says where the tokenizer comes from")
    for name in ("vocab_size", "tokenizer_kind") if args.tokenizer is not None else ("fairseq_dict",):
        if (value := getattr(args, name)) is not None:
            other = "--tokenizer" if args.tokenizer is not None else "--train_tokenizer"
            raise UserError(f"--{name}={value} has no meaning with {other}; leave it out")
    spec = TokenizerSpec(vocab_size=args.vocab_size or 50_265, kind=args.tokenizer_kind or "bytebpe")
    corpus = build_store(
        args.input,
        spec if args.train_tokenizer else args.tokenizer,
        args.out,
        num_workers=args.num_workers,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        text_key=args.text_key,
        drop_duplicates=args.drop_duplicates,
        pad_vocab_to=args.pad_vocab_to,
        fairseq_dict=args.fairseq_dict,
        show_progress=not args.quiet,
    )
    for name, count in corpus.info["counts"].items():
        print(f"{args.out}/{name}: " + ", ".join(f"{number:,} {what}" for what, number in count.items()))
    if args.drop_duplicates:
        print(f"{corpus.info['num_duplicates']:,} documents dropped as duplicates")
    if pages := corpus.info.get("left_out_pages"):
        print("pages of dumps left out: " + ", ".join(f"{count:,} {reason}" for reason, count in pages.items()))
    if replaced := corpus.info.get("replaced_characters"):
        names = ", ".join(f"{printable(name)} {count:,}" for name, count in Counter(replaced).most_common(3))
        print(f"{sum(replaced.values()):,} characters that are no Unicode became U+FFFD (most in: {names})")


if __name__ == "__main__":
    sys.exit(main())
