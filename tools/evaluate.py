#!/usr/bin/env python3
"""Measure models: perplexity with fixed masks, domain by domain; fine-tuning on GLUE and on sets of classes."""

import argparse
import sys
from pathlib import Path

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.evaluation.scores import GRADED, METRICS
from ki_ds.evaluation.tasks import GLUE, PAPER_GRIDS, SET_SEEDS, Grid, Settings, TaskData


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    _add_ppl(commands.add_parser("ppl", help="perplexity, one row a model"))
    model = "run or checkpoint of ours, or Hugging Face folder or hub name"
    glue = commands.add_parser("glue", help="fine-tune on tasks of GLUE")
    glue.add_argument("models", nargs="+", metavar="MODEL", help=model)
    classify = commands.add_parser("classify", help="fine-tune on a set of classes in JSON lines")
    classify.add_argument("models", nargs="+", metavar="MODEL", help=model)
    along = commands.add_parser("along", help="fine-tune the checkpoints of runs: scores against steps")
    along.add_argument("models", nargs="+", metavar="RUN", help="runs of ours, the first to be compared with")
    for command in (glue, along):
        needed = command is glue
        what = "tasks of GLUE, or all eight" + ("" if needed else " (default: --data is a set of classes)")
        command.add_argument("--task", nargs="+", choices=["all", *GLUE], required=needed, help=what)
    for command in (glue, classify, along):
        _add_fine_tuning(command)
    args = parser.parse_args()
    {"ppl": _ppl, "glue": _fine_tune, "classify": _fine_tune, "along": _fine_tune}[args.what](args)


# --- perplexity -------------------------------------------------------------------------------------------------


def _add_ppl(ppl: argparse.ArgumentParser) -> None:
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


def _ppl(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ki_ds.evaluation.perplexity import data_of_run, given_data, measure, table, write_figures

    if args.data is None:
        defaults = {"task": None, "tokenizer": None, "seq_len": 512, "mask_variants": 1, "max_samples": None}
        for name, default in defaults.items():
            if getattr(args, name) != default:
                raise UserError(f"--{name}={getattr(args, name)} has no meaning without --data; leave it out")
        data, task = data_of_run(args.models[0])
    else:
        data, task = given_data(
            args.data,
            args.task,
            tokenizer=args.tokenizer,
            seq_len=args.seq_len,
            mask_variants=args.mask_variants,
            max_samples=args.max_samples,
        )
    index_dir = Path(".ki_ds_index")
    found = measure(
        args.models, data, task, index_dir=index_dir, micro_batch_size=args.micro_batch_size, dtype=args.dtype
    )
    if args.out:
        write_figures(found, Path(args.out))
    Console().print(table(found))


# --- fine-tuning ------------------------------------------------------------------------------------------------


def _add_fine_tuning(command: argparse.ArgumentParser) -> None:
    glue, sets, one = PAPER_GRIDS["glue"], PAPER_GRIDS["classify"], Settings(lr=0.0, batch_size=1)

    def paper(name: str) -> str:
        found = [" ".join(f"{value:g}" for value in getattr(grid, name)) for grid in (glue, sets)]
        return f"(default: {found[0]} for GLUE, {found[1]} else)"

    hub = "" if command.prog.endswith("classify") else "; hub: GLUE by the package datasets"
    command.add_argument("--data", required=True, help=f"folder of the data{hub}")
    command.add_argument("--lr", type=float, nargs="+", help=f"peak learning rates to try {paper('lrs')}")
    command.add_argument("--batch_size", type=int, nargs="+", help=f"examples of an update {paper('batch_sizes')}")
    seeds = f"fine-tunings of each setting (default: 5 for GLUE, 3 for its large tasks, {SET_SEEDS} else)"
    command.add_argument("--seeds", type=int, help=seeds)
    command.add_argument("--epochs", type=int, default=one.epochs, help="at most; the best one counts (%(default)s)")
    command.add_argument("--warmup_ratio", type=float, default=one.warmup_ratio, help="of the updates (%(default)s)")
    command.add_argument("--weight_decay", type=float, default=one.weight_decay, help="decoupled (%(default)s)")
    command.add_argument("--max_length", type=int, default=one.max_length, help="tokens of an example (%(default)s)")
    command.add_argument("--max_train_samples", type=int, help="a fixed random part of the training examples")
    size = "examples of a forward pass; no result depends on it but for rounding (%(default)s)"
    command.add_argument("--micro_batch_size", type=int, default=one.micro_batch_size, help=size)
    precision = ["fp32", "bf16", "fp16"]
    command.add_argument("--precision", choices=precision, default=one.precision, help="fp32, or autocast to another")
    if not command.prog.endswith("glue"):
        metrics = [name for name in METRICS if name not in GRADED]
        command.add_argument("--metric", choices=metrics, help="of a set of classes (default: see docs/evaluation.md)")
    command.add_argument("--tokenizer", help="folder or hub name, for models that bring none")
    command.add_argument("--out", default="runs/evaluation", help="folder that keeps every result (%(default)s)")


def _fine_tune(args: argparse.Namespace) -> None:
    grid, sets = _grid(args), _sets(args)
    from rich.console import Console

    from ki_ds.evaluation.downstream import curve_table, evaluate, evaluate_along, reached, tables
    from ki_ds.evaluation.finetune import Candidate

    console, out = Console(width=None if sys.stdout.isatty() else 160), Path(args.out)
    for note in (note for data in sets for note in data.notes):
        console.print(note, highlight=False)
    if args.what == "along":
        curves = evaluate_along(args.models, sets, grid, out, num_seeds=args.seeds, tokenizer=args.tokenizer)
        console.print(curve_table(curves, sets))
        console.print("\n".join([*reached(curves), f"{out}/along.png"]), highlight=False)
        return
    candidates = [Candidate.find(model, tokenizer=args.tokenizer) for model in args.models]
    rows = evaluate(candidates, sets, grid, out, num_seeds=args.seeds)
    for shown in tables(rows, sets):
        console.print(shown)


def _grid(args: argparse.Namespace) -> Grid:
    """The settings to try: the paper's where nothing else is said."""
    for name in ("seeds", "epochs", "max_length", "max_train_samples", "micro_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    for name, low, high in (("warmup_ratio", 0.0, 1.0), ("weight_decay", 0.0, float("inf"))):
        if not low <= getattr(args, name) < high:
            raise UserError(f"--{name}={getattr(args, name)} is not in [{low:g}, {high:g})")
    common = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if name not in ("lr", "batch_size")}
    paper = PAPER_GRIDS["classify" if getattr(args, "task", None) is None else "glue"]
    lrs, sizes = args.lr or paper.lrs, args.batch_size or paper.batch_sizes
    for lr in lrs:
        if not 0 < lr < 1:
            raise UserError(f"--lr={lr:g} is not in (0, 1)")
    for size in sizes:
        micro = min(size, args.micro_batch_size)
        if size < 1 or size % micro:
            raise UserError(f"--batch_size={size} is not a positive multiple of --micro_batch_size={micro}; change one")
    return Grid(tuple(dict.fromkeys(lrs)), tuple(dict.fromkeys(sizes)), common)


def _sets(args: argparse.Namespace) -> list[TaskData]:
    """The data, read and checked before any model."""
    from ki_ds.evaluation.reading import read_glue, read_set

    tasks, metric = getattr(args, "task", None), getattr(args, "metric", None)
    if tasks is None:
        return [read_set(args.data, metric)]
    if metric is not None:
        raise UserError(f"--metric={metric} has no meaning for GLUE, whose tasks have their own; leave it out")
    names = list(GLUE) if "all" in tasks else list(dict.fromkeys(tasks))
    return [read_glue(name, args.data) for name in names]


if __name__ == "__main__":
    sys.exit(main())
