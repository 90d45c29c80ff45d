"""What every launcher starts, once a rank: the command line, then the run.

The configuration is read before anything heavy is imported, so that --help and a typo answer at once.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ki_ds import config as configuration
from ki_ds.errors import UserError, common_to_all_ranks
from ki_ds.ranks.environment import launched, own_rank

RECIPES = Path(__file__).resolve().parents[1] / "launchers" / "recipes"
PLAN_OPTIONS = ("--num_gpus", "--mfu", "--peak_tflops", "--vocab_size", "--device", "--num_runs")
DEMO = ["--config", str(RECIPES / "demo_mlm.yaml"), "--config", str(RECIPES / "demo_mlm_inherit.yaml")]


def ends_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's main: a `UserError` becomes one line on stderr and exit code 2 (75 if resumable), Ctrl-C 130."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if not error.said_by_main or own_rank(os.environ) == "0":
                print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted; call it again to go on", file=sys.stderr, flush=True)
            return 130
        except BrokenPipeError:  # `| head` closed the pipe: not an error of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    return wrapped


def main(argv: list[str]) -> None:
    """Train the run that the command line describes and end the process with its exit code. Does not return.

    Without arguments it is the demo's inheriting run. DeepSpeed's launcher adds --local_rank=N; openmpi, slurm and
    torchrun say it in the environment.
    """
    started = time.monotonic()
    code = ends_cleanly(lambda: _run(_without_local_rank(argv), started))()
    if "ki_ds.ranks.world" in sys.modules:
        from ki_ds.ranks.world import leave

        leave(code)
    if code and own_rank(os.environ) != "0":
        time.sleep(5)  # launchers end all ranks as soon as one has failed: let rank 0 print its line first
    sys.exit(code)


def _run(argv: list[str], started: float) -> None:
    with common_to_all_ranks():
        if any(argument == "--dry_run" for argument in argv):
            _plan(argv)
            return
        _refuse_plan_options(argv)
        restarts, argv = _take_max_restarts(argv)
        if restarts is not None:
            _supervise(argv, restarts)
            return
        _refuse_options_of_deepspeed()
        config = configuration.parse(argv or DEMO)
        if not argv and not Path(config.data.corpus).is_dir():
            raise UserError(f"the demo's {config.data.corpus} is not there; run `make demo` first, or give --config")
    gc.disable()  # to look for garbage among modules half imported takes a seventh of the start
    from ki_ds.training.loop import train

    gc.freeze()  # nor need the modules be looked through in training
    gc.enable()
    train(config, started=started)


def _plan(argv: list[str]) -> None:
    if any(argument.partition("=")[0] == "--max_restarts" for argument in argv):
        raise UserError("--max_restarts has no meaning with --dry_run, which starts nothing; leave it out")
    from ki_ds.planning.dry_run import show

    show(argv)


def _refuse_plan_options(argv: list[str]) -> None:
    for argument in argv:
        if (name := argument.partition("=")[0]) in PLAN_OPTIONS:
            raise UserError(f"{name} is an option of a plan; give --dry_run as well, or leave it out")


def _refuse_options_of_deepspeed() -> None:
    place, options = launched(os.environ), os.environ.get("KI_DS_ARGS")
    if place and options:
        raise UserError(
            f"KI_DS_ARGS={options} is for the deepspeed that bash launchers/train_ki.sh starts, but {place.launcher} "
            "has started this rank; unset it, or leave that launcher out"
        )


def _supervise(argv: list[str], restarts: int) -> None:
    if launched(os.environ):
        raise UserError(
            f"--max_restarts {restarts} was given to a rank; give it to bash launchers/train_ki.sh, which starts them"
        )
    from ki_ds.jobs.supervisor import run_supervised

    run_supervised(argv or DEMO, max_restarts=restarts)


def _take_max_restarts(argv: list[str]) -> tuple[int | None, list[str]]:
    """The value of `--max_restarts N` (or =N), None where it is not given, and the other arguments."""
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        name, _, text = argument.partition("=")
        if name != "--max_restarts":
            rest.append(argument)
            continue
        value = text or next(arguments, "")
        if not value.isdecimal():
            raise UserError(f"--max_restarts {value} is no number of restarts; give 0 or more")
    return None if value is None else int(value), rest


def _without_local_rank(argv: list[str]) -> list[str]:
    rest = []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__local_rank":
            os.environ.setdefault("LOCAL_RANK", value)
        else:
            rest.append(argument)
    return rest
