#!/usr/bin/env python3
"""Measure models on data of your own: perplexity with fixed masks, domain by domain."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from ki_ds import config as configuration
from ki_ds.config import DataConfig, Task
from ki_ds.errors import UserError, ends_cleanly
from ki_ds.evaluation.measure import measure, table


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    ppl = parser.add_subparsers(dest="what", required=True).add_parser("ppl", help="perplexity, one row a model")
    ppl.add_argument("models", nargs="+", metavar="MODEL", help="run of ours, or Hugging Face folder or hub name")
    ppl.add_argument("--data", nargs="+", metavar="[DOMAIN=]CORPUS", help="as data.corpus (default: the first run's)")
    ppl.add_argument("--task", choices=["mlm", "causal"], help="needed with --data")
    ppl.add_argument("--tokenizer", help="as data.tokenizer")
    ppl.add_argument("--seq_len", type=int, default=512, help="tokens of a block (with --data)")
    ppl.add_argument("--mask_variants", type=int, default=1, help="times an mlm set is masked (with --data)")
    ppl.add_argument("--max_samples", type=int, help="blocks of a domain at most (with --data)")
    ppl.add_argument("--micro_batch_size", type=int, default=16, help="sequences of a forward pass")
    ppl.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights")
    ppl.add_argument("--out", help="JSON with sums, rows and perplexities")
    args = parser.parse_args()
    data, task = _own_data(args) if args.data is None else _given_data(args)
    index_dir = Path(".ki_ds_index")
    found = measure(
        args.models, data, task, index_dir=index_dir, micro_batch_size=args.micro_batch_size, dtype=args.dtype
    )
    if args.out:
        rows = [{"model": row.model, **{name: part.figures for name, part in row.domains.items()}} for row in found]
        Path(args.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    Console().print(table(found))


def _own_data(args: argparse.Namespace) -> tuple[DataConfig, Task]:
    """What the first model, a run of ours, was validated on."""
    defaults = {"task": None, "tokenizer": None, "seq_len": 512, "mask_variants": 1, "max_samples": None}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name}={getattr(args, name)} has no meaning without --data; leave it out")
    path = Path(args.models[0]) / "config.yaml"
    if not path.is_file():
        raise UserError(f"{args.models[0]} is no run of ours, whose data would be known; give --data and --task")
    config = configuration.load(path)
    return config.data, config.task


def _given_data(args: argparse.Namespace) -> tuple[DataConfig, Task]:
    if args.task is None:
        raise UserError("--data needs --task mlm or --task causal")
    corpora = {}
    for given in args.data:
        name, equals, path = given.partition("=")
        corpora.update({name: path} if equals else {Path(given).name: given})
    first = next(iter(corpora.values()))
    data = DataConfig(
        corpus=first,
        valid=corpora,
        tokenizer=args.tokenizer,
        seq_len=args.seq_len,
        valid_mask_variants=args.mask_variants,
        max_valid_samples=args.max_samples,
    )
    run = configuration.RunConfig(run_dir="unused", task=args.task, data=data)
    configuration.validate(run)
    return data, args.task


if __name__ == "__main__":
    sys.exit(main())
