"""`--dry_run`: what a run will need, printed before anything is trained, written or downloaded."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.data.datasets import read_vocabulary
from ki_ds.errors import UserError
from ki_ds.planning.devices import device_named, peak_flops_of
from ki_ds.planning.planner import Plan, plan
from ki_ds.planning.sizes import Size, size_of_teacher
from ki_ds.ranks.environment import launched, own_rank


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash launchers/train_ki.sh --dry_run",
        description="Print what a run will need: memory a rank, FLOPs, hours, disk, the cheapest place for its "
        "teacher. Nothing is trained, written or downloaded. All other arguments are the run's own.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--dry_run", action="store_true", required=True, help="plan instead of train")
    parser.add_argument("--num_gpus", type=int, help="ranks of the job, teachers' included (the launcher's, or 1)")
    parser.add_argument(
        "--device", help="cpu, gpu, or a GPU's name, e.g. H100, whose peak is then looked up (what is here)"
    )
    parser.add_argument(
        "--peak_tflops", type=float, help="a device's peak in the run's precision, e.g. 989 for an H100"
    )
    parser.add_argument("--mfu", type=float, help="share of the peak that training reaches (0.4)")
    parser.add_argument("--vocab_size", type=int, help="ids of the tokenizer, where the corpus is not there yet")
    parser.add_argument("--num_runs", type=int, help="runs that would share a teacher cache (1)")
    return parser


def show(argv: list[str]) -> None:
    """Print the plan of the run that the command line describes; on rank 0 only.

    Raises:
        UserError: what the run would refuse; or sizes that cannot be known yet.
    """
    parser = _parser()
    try:
        args, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --dry_run --help lists the options of a plan") from None
    config = configuration.parse(rest)
    device, on_gpu = device_named(args.device)
    peak = peak_flops_of(device, config.engine.precision) if on_gpu else None
    num_classes = _num_classes(args.vocab_size, config)
    found = plan(
        config,
        num_ranks=_num_ranks(args.num_gpus, os.environ),
        num_classes=num_classes,
        teachers=_teachers(config, num_classes),
        on_gpu=on_gpu,
        mfu=0.4 if args.mfu is None else args.mfu,
        peak_flops=peak if args.peak_tflops is None else 1e12 * args.peak_tflops,
        num_runs=1 if args.num_runs is None else args.num_runs,
    )
    if own_rank(os.environ) == "0":
        Console(width=100, highlight=False).print(plan_table(found, title=config.run_dir))


def _num_ranks(given: int | None, env: Mapping[str, str]) -> int:
    """Ranks of the job: as given, as a launcher has started, or as KI_DS_ARGS would have it start; else 1."""
    if given is not None and given < 1:
        raise UserError(f"--num_gpus {given} is not positive; give the ranks of the job")
    place = launched(env)
    started = place.world_size if place else None
    if given is not None and started and int(started) != given:
        raise UserError(f"--num_gpus {given} was given to a job of {started} ranks; give it to one of them only")
    if given is not None or started:
        return given or int(started or 1)
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--num_gpus", type=int, default=1)
    return launcher.parse_known_args(shlex.split(env.get("KI_DS_ARGS", "")))[0].num_gpus


def _num_classes(given: int | None, config: RunConfig) -> int:
    """Ids of the tokenizer: as given, or those of the run's first source."""
    if given is not None:
        if not 8 <= given < 2**31:
            raise UserError(f"--vocab_size {given} is outside [8, 2^31); give the number of the tokenizer's ids")
        return given
    try:
        return read_vocabulary(config.data, config.task).size
    except UserError as error:
        raise UserError(f"{error}; or give the plan the number of the tokenizer's ids: --vocab_size 50265") from None


def _teachers(config: RunConfig, num_classes: int) -> list[Size]:
    field = "teacher.path" if config.teachers is None else "teachers.{}.path"
    return [
        size_of_teacher(entry.path, config.task, num_classes, what=field.format(number))
        for number, entry in enumerate(config.all_teachers)
    ]


# --- the table --------------------------------------------------------------------------------------------------


def plan_table(found: Plan, *, title: str = "") -> Table:
    """A plan for people: name, figure, and what it is made of."""
    rows = Table(title=title or None, show_header=False, box=None, pad_edge=False, title_justify="left")
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, figure, note in _rows(found):
        rows.add_row(name, figure, note)
    return rows


def _rows(found: Plan) -> Iterator[tuple[str, str, str]]:
    yield "parameters", f"{found.parameters:,}", f"{found.dense_parameters:,} of them count for FLOPs"
    ranks = f"{found.num_ranks} ranks"
    if found.num_teacher_ranks:
        ranks += f", {found.num_teacher_ranks} of them the teacher's"
    yield "memory a rank", _bytes(found.total_memory), f"{ranks}; at its worst: {found.memory_moment}"
    for name, size in found.memory.items():
        yield f"  {name}", _bytes(size), ""
    for what, held in (("host memory a rank", found.host_memory), ("memory of a teacher's rank", found.teacher_memory)):
        if held:
            yield what, _bytes(sum(held.values())), ", ".join(f"{k} {_bytes(v)}" for k, v in held.items() if v)
    at_most = "at most " if found.taught_is_bound else ""
    yield "steps", f"{found.num_steps:,}", f"{at_most}{found.num_taught_steps:,} of them taught"
    yield "tokens", f"{found.num_tokens:.4g}", f"{found.num_tokens // found.num_steps:,} a step"
    yield "FLOPs, student", f"{found.student_flops:.4g}", f"{found.student_flops_per_step:.4g} a step"
    for number, teacher in enumerate(found.teachers):
        name = "FLOPs, teacher" if len(found.teachers) == 1 else f"FLOPs, teacher {number}"
        yield name, f"{at_most}{teacher.flops:.4g}", f"{teacher.flops_per_step:.4g} a taught step"
    if found.seconds is None:
        yield "hours", "unknown", "the device's peak is not known: give --peak_tflops, or --device with its name"
    else:
        yield "hours", f"{at_most}{found.seconds / 3600:,.2f}", "of training, without validation and saving"
    if found.bytes_sent:
        yield "sent a step and rank", _bytes(found.bytes_sent), "gradients and weights through collectives, in rings"
    yield "disk of the run", _bytes(found.disk), f"{_bytes(found.checkpoint_disk)} a checkpoint"
    if found.teachers:
        kinds = f"hidden states in fp16: {_bytes(found.hidden_cache_disk)}"
        yield "disk of a teacher cache", _bytes(found.topk_cache_disk), f"top-10, at most; {kinds}"
        yield "best teacher.placement", found.best_placement, found.reason
    for note in found.notes:
        yield "note", "", note


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
