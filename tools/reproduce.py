#!/usr/bin/env python3
"""Run an experiment of the paper, a recipe of launchers/recipes, at one of three scales, to its report.

  launchers/reproduce.sh fig1a --scale tiny --dry_run        what would be run, and what it would cost
  launchers/reproduce.sh fig1a --scale tiny --seeds 3 --parallel 2
  launchers/reproduce.sh tab2 --scale tiny --data WB=novels.txt CS=abstracts.txt BIO=articles.txt
  launchers/reproduce.sh fig2b --data WB=CORPUS --hostfile hosts --parallel 2

Called again, it goes on: finished runs are skipped, interrupted ones resumed. Experiments of one scale share runs.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError

if TYPE_CHECKING:
    from ki_ds.experiments.reproduce import PlannedExperiment
    from ki_ds.jobs.chain import Place


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    from ki_ds.experiments.recipes import experiments, scales

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("experiment", metavar="ID", help=", ".join(experiments()))
    parser.add_argument(
        "--scale", default="paper", help=f"one of {', '.join(scales())}, or a YAML of your own (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="students of each kind (%(default)s)")
    parser.add_argument(
        "--data", nargs="+", action="extend", default=[], metavar="DOMAIN=PATH",
        help="text (a file or glob, several times a domain if need be), or a prepared, fairseq or Megatron corpus",
    )  # fmt: skip
    parser.add_argument("--tokenizer", help="Hugging Face folder, for texts (default: one is trained on them)")
    parser.add_argument("--downstream", help="folder of downstream sets, where an experiment fine-tunes")
    parser.add_argument("--no_baselines", action="store_true", help="leave out runs that are there to compare with")
    parser.add_argument("--out", type=Path, help="folder of everything (runs/SCALE)")
    parser.add_argument("--num_gpus", type=int, help="GPUs of a host for each job, or ranks without GPUs (all; 1)")
    parser.add_argument("--hostfile", type=Path, help="hosts, as DeepSpeed reads them: `worker-1 slots=8`")
    parser.add_argument("--parallel", type=int, default=1, help="jobs side by side on equal parts (%(default)s)")
    parser.add_argument("--max_restarts", type=int, default=0, help="times a failed job is started again (%(default)s)")
    parser.add_argument("--device", help="of the plan: cpu, gpu, or a GPU's name as H100 (what is here)")
    parser.add_argument("--peak_tflops", type=float, help="of the plan: a device's peak in the runs' precision")
    parser.add_argument("--mfu", type=float, default=0.4, help="of the plan: share of the peak (%(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and its cost, run nothing")
    args = parser.parse_args()
    _check(args)
    _run(args)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("num_gpus", 1), ("parallel", 1), ("max_restarts", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small; give at least {least}")
    for given in args.data:
        domain, equals, path = given.partition("=")
        if not (domain and equals and path):
            raise UserError(f"--data {given} is not DOMAIN=PATH, e.g. WB=corpora/wb; mend it")


def _run(args: argparse.Namespace) -> None:
    from ki_ds.experiments.reproduce import Request, plan, reproduce
    from ki_ds.jobs.chain import hostfile_places, local_places

    data: dict[str, list[str]] = {}
    for given in args.data:
        domain, _, path = given.partition("=")
        data.setdefault(domain, []).append(path)
    request = Request(
        recipe=args.experiment,
        scale=args.scale,
        seeds=args.seeds,
        data=data,
        tokenizer=args.tokenizer,
        downstream=args.downstream,
        baselines=not args.no_baselines,
        out=args.out or Path("runs") / Path(args.scale).stem,
    )
    if args.hostfile:
        places = hostfile_places(args.hostfile, args.num_gpus, args.parallel)
    else:
        places = local_places(args.num_gpus, args.parallel)
    planned = plan(request, num_ranks=places[0].num_ranks, dry=args.dry_run)
    if planned.jobs:
        _print_plan(args, planned, places)
    if not args.dry_run:
        reproduce(planned, places, max_restarts=args.max_restarts)


def _print_plan(args: argparse.Namespace, planned: "PlannedExperiment", places: "list[Place]") -> None:
    from rich.console import Console

    from ki_ds.experiments.forecast import device_hours, forecast, forecast_table
    from ki_ds.planning.devices import device_named
    from ki_ds.planning.dry_run import plan_table

    peak = None if args.peak_tflops is None else 1e12 * args.peak_tflops
    plans = forecast(planned, places[0], device=args.device, peak_flops=peak, mfu=args.mfu)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if args.dry_run:
        for name, found in plans.items():
            console.print(plan_table(found, title=name), "")
    console.print(forecast_table(planned, places, plans))
    if (hours := device_hours(list(plans.values()))) is not None:
        print(
            f"all runs: {hours:,.0f} hours of one {device_named(args.device)[0]} at {args.mfu:.0%} of its peak",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
