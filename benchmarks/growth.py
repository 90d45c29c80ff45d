"""How time and memory of an inheriting step grow, one dimension at a time; Markdown tables and a figure last.

    python -m benchmarks.growth --out growth.json --figure docs/growth.png   # all of it; called again it goes on
    python -m benchmarks.growth --vary vocab_size num_ranks --out growth.json
    python -m benchmarks.growth --from growth.json --figure growth.svg        # tables and figure of what is there

Everything but the varied dimension is that of the base, a size of step.py. Each point trains in a process of its
own on random text, in turns of a few steps with the base, so that ratios are taken of the same moment; times are
medians over the turns (fastest-slowest). Points of `topk` read their teacher from a cache of K entries a row, written
first. Points of `num_ranks` train the base's micro-batch on every rank (gloo on a CPU), one thread a rank: with fewer
cores than ranks their CPU time a rank counts, and no wall time is given; their measure is one rank, not the base.

Memory is the largest of a rank above its imports, as the planner counts it: in processes of their own, which give freed
memory back at once; the forecast is that of the worst moment of a step (validation and checkpoints are not run). "As
run" is the peak of the timed processes, in which freed memory is kept. On a GPU both are the peak of what torch has
allocated. FLOPs are counted as step.py does: computed, and nominal in brackets.

`loss` runs the loss and its gradients alone, ours and PyTorch's eager logits, over N rows times V classes growing
64-fold: the peak above the inputs less the gradients, which every implementation has to return.
A point that needs more memory than is free is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import loss as bench_loss
from benchmarks.harness import MIB, check_at_least, heading, markdown, parser, ratios, run_ranks, spread, write_results
from benchmarks.plan import GIVE_BACK
from benchmarks.step import GPU_SIZES, OURS, SIZES, Size, Worker, account, build, job_of, make_inputs
from benchmarks.step_rows import NUM_WARM_STEPS, Job, arguments
from ki_ds import config as configuration
from ki_ds.cli import ends_cleanly
from ki_ds.errors import UserError
from ki_ds.planning import planner
from ki_ds.planning.sizes import size_of_teacher
from ki_ds.ranks.world import free_port
from ki_ds.reports import figures

MEMORY_STEPS = 3  # of a process that measures memory alone
KEPT = 1.8  # resident memory of a run as it is over the forecast, at most (docs/planning.md)
EAGER_COPIES = 9  # of N x V float32 numbers, at most, that eager logits take at once
STEP_MOMENTS = ("forward and loss", "backward, first layer", "backward, last layer", "reduction of gradients", "update")
VALUES: dict[str, list[int]] = {
    "vocab_size": [8_192, 16_384, 32_768, 65_536, 131_072, 262_144],
    "seq_len": [64, 128, 256, 512, 1024],
    "micro_batch_size": [4, 8, 16, 32, 64],
    "topk": [1, 10, 50, 100],
    "num_ranks": [1, 2, 3, 4],
}
TINY_VALUES = {"vocab_size": [320, 640], "seq_len": [16, 32], "micro_batch_size": [2, 4], "topk": [1, 10]}
TINY_VALUES |= {"num_ranks": [1, 2]}
TITLES = {
    "vocab_size": "vocabulary",
    "seq_len": "tokens a sequence",
    "micro_batch_size": "sequences a micro-batch",
    "topk": "K of a top-K cache",
    "num_ranks": "ranks",
}


@dataclass
class Point:
    """One value of one dimension: what its turns took, a rank's memory, and what was expected of both."""

    dimension: str
    value: int
    seconds: list[float] = field(default_factory=list)  # a step
    cpu_seconds: list[float] = field(default_factory=list)  # of a rank and step
    base_seconds: list[float] = field(default_factory=list)  # of the base in the same turns
    tokens: float = 0.0  # a step, of all ranks
    peak_mib: float = 0.0
    kept_mib: float = 0.0
    forecast_mib: float = 0.0
    moment: str = ""
    flops: float = 0.0  # of a rank and step, as computed
    nominal_flops: float = 0.0
    loss_share: float = 0.0  # of a profiled step
    cores: int = 0
    left_out: str = ""  # why it was not measured

    @property
    def second(self) -> float:
        """Median seconds a step."""
        return statistics.median(self.seconds)

    @property
    def cpu_second(self) -> float:
        """Median CPU seconds of a rank and step."""
        return statistics.median(self.cpu_seconds)

    @property
    def has_wall_time(self) -> bool:
        """Whether every rank had a core of its own."""
        return self.dimension != "num_ranks" or self.value <= self.cores


@dataclass
class LossPoint:
    """The loss alone at one size; None where it was left out."""

    num_rows: int
    num_classes: int
    ours_mib: float | None = None
    eager_mib: float | None = None


# ------------------------------------------------------------------------------------------------ a point


class Ranks:
    """The processes of a job, told the same at the same time."""

    def __init__(self, job: Job, num_ranks: int = 1, **environment: str):
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port(), **environment}
        own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        self.workers = [Worker(OURS, job, **each) for each in own]

    def answers(self) -> list[dict[str, Any]]:
        """What each says next. Raises UserError where one has died."""
        return [worker.answer() for worker in self.workers]

    def tell(self, **command: Any) -> list[dict[str, Any]]:
        """Give all a command and wait for all."""
        for worker in self.workers:
            worker.order(**command)
        return self.answers()

    def kill(self) -> None:
        """End them whatever they do."""
        for worker in self.workers:
            worker.kill()


@dataclass(frozen=True)
class Sweep:
    """What all points share."""

    base: Size
    turns: int
    steps: int
    num_threads: int
    num_workers: int
    ds_config: str
    folder: Path

    @property
    def num_steps(self) -> int:
        """Steps that a point trains."""
        return NUM_WARM_STEPS + self.turns * self.steps + 1

    def job(self, size: Size, **fields: Any) -> Job:
        """A job; its text and teacher are made where they are missing."""
        folder = self.folder / f"{size.vocab_size}_{size.seq_len}"
        if not folder.exists():
            make_inputs(size, folder)
        options: dict[str, Any] = {"num_threads": self.num_threads, "num_workers": self.num_workers}
        return job_of(size, folder, ds_config=self.ds_config, **options) | {"fields": fields}


def flops_of(size: Size, *, cached: bool = False) -> tuple[float, float]:
    """(computed, nominal) FLOPs of a rank's step; a cached teacher computes nothing."""
    student = account(build(size, size.student, seed=1), size)
    teacher = account(build(size, size.teacher, seed=2), size)
    share, tokens = 0.0 if cached else 1.0, size.micro_batch_size * size.seq_len
    nominal = (6.0 * student.dense_parameters + share * 2.0 * teacher.dense_parameters) * tokens
    return 3 * student.forward + share * teacher.forward, nominal


def job_at(sweep: Sweep, point: Point) -> Job:
    """The job of a point, whose FLOPs are noted; a cache is written."""
    size, fields, where = sweep.base, {}, f"{point.dimension}_{point.value}"
    if hasattr(size, point.dimension):
        size = replace(size, **{point.dimension: point.value})  # type: ignore[arg-type]
    if point.dimension == "num_ranks":
        sweep = replace(sweep, num_threads=1)
        fields["train.global_batch_size"] = size.micro_batch_size * point.value
    if point.dimension == "topk":
        fields["train.num_steps"] = sweep.num_steps
    job = sweep.job(size, **fields)
    point.flops, point.nominal_flops = flops_of(size, cached=point.dimension == "topk")
    job["fields"]["run_dir"] = str(sweep.folder / f"run_{where}")
    if point.dimension == "topk":
        out = sweep.folder / where
        command = ["tools/cache_teacher.py", "--out", str(out), "--topk", str(point.value)]
        run_ranks([*command, *arguments(job, taught=True), "--run_dir", f"{out}_run"])
        job["fields"] |= {"teacher.placement": "cache", "teacher.path": str(out)}
    return job


def forecast(job: Job, num_ranks: int) -> tuple[float, str]:
    """(the planner's MiB of a rank at the worst moment of a step, less what is imported; that moment)."""
    config, on_gpu = configuration.parse(arguments(job, taught=True)), torch.cuda.is_available()
    classes = job["vocab_size"]
    teachers = [size_of_teacher(entry.path, config.task, classes) for entry in config.all_teachers]
    found = planner.plan(config, num_ranks=num_ranks, num_classes=classes, teachers=teachers, on_gpu=on_gpu)
    worst = max(STEP_MOMENTS, key=lambda name: found.moments[name])
    return (found.moments[worst] - (0 if on_gpu else planner.CPU_IMPORTS)) / MIB, worst


def free_mib() -> float:
    """Memory that is free, of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / MIB
    return psutil.virtual_memory().available / MIB


def measure(sweep: Sweep, point: Point, base: Ranks | None) -> None:
    """Fill a point in, in turns with the base; or say why it is left out."""
    num_ranks = point.value if point.dimension == "num_ranks" else 1
    point.cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available() and num_ranks > torch.cuda.device_count():
        point.left_out = f"{torch.cuda.device_count()} GPU is too few"
        return
    job = job_at(sweep, point)
    point.forecast_mib, point.moment = forecast(job, num_ranks)
    needed, free = KEPT * num_ranks * point.forecast_mib, free_mib()
    if needed > free:
        point.left_out = f"may need {needed:,.0f} MiB, {free:,.0f} are free"
        return
    ranks = Ranks(job, num_ranks)
    try:
        ranks.answers()  # warmed up
        for _ in range(sweep.turns):
            found = ranks.tell(do="steps", steps=sweep.steps)
            point.seconds.append(max(each["seconds"] for each in found) / sweep.steps)
            point.cpu_seconds.append(statistics.mean(each["cpu_seconds"] for each in found) / sweep.steps)
            point.tokens = sum(each["tokens"] for each in found) / sweep.steps
            if base is not None:
                point.base_seconds.append(base.tell(do="steps", steps=sweep.steps)[0]["seconds"] / sweep.steps)
        parts = ranks.tell(do="profile", steps=1)[0]["parts"]
        point.loss_share = parts["loss"] / sum(parts.values())
        point.kept_mib = max(each["peak_mib"] for each in ranks.tell(do="end"))
    finally:
        ranks.kill()
    point.peak_mib = point.kept_mib if torch.cuda.is_available() else peak_mib(job, num_ranks)


def peak_mib(job: Job, num_ranks: int) -> float:
    """The largest peak of a rank that gives freed memory back at once."""
    ranks = Ranks(job | {"give_back": True, "num_warm_steps": MEMORY_STEPS}, num_ranks, **GIVE_BACK)
    try:
        ranks.answers()
        return max(each["peak_mib"] for each in ranks.tell(do="end"))
    finally:
        ranks.kill()


# ------------------------------------------------------------------------------------------------ the loss alone


def loss_points(name: str) -> list[LossPoint]:
    """Four sizes, each with four times the logits of the one before; the first fills one chunk of ours."""
    rows, classes = (8, 256) if name == "tiny" else (2_048, 65_536) if name in GPU_SIZES else (1_024, 32_768)
    return [LossPoint(rows << step, classes << step) for step in range(4)]


def measure_loss(point: LossPoint, sweep: Sweep) -> None:
    """Peaks of ours and of eager logits, less the gradients of both; eager ones where half of what is free suffices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(sweep.num_threads or len(os.sched_getaffinity(0)))
    widths = (min(sweep.base.student.get("hidden_size", 1024), 1024), sweep.base.teacher.get("hidden_size", 768))
    size = bench_loss.Size(point.num_rows, *widths, point.num_classes, point.num_classes)
    x = bench_loss.Inputs.make(size, torch.bfloat16 if device == "cuda" else torch.float32, device)
    returned = sum(leaf.numel() * leaf.element_size() for leaf in x.head_leaves) / MIB
    point.ours_mib = bench_loss.peak_mib(bench_loss.ours_linear(x), device) - returned
    if EAGER_COPIES * 4 * point.num_rows * point.num_classes / MIB < free_mib() / 2:
        point.eager_mib = bench_loss.peak_mib(bench_loss.eager(x), device) - returned


# ------------------------------------------------------------------------------------------------ tables, figure


def ratio_to_base(point: Point, first: Point) -> list[float]:
    """Of the base, turn by turn; of ranks the CPU time against one rank."""
    if point.dimension == "num_ranks":
        return [seconds / first.cpu_second for seconds in point.cpu_seconds]
    return ratios(point.seconds, point.base_seconds)


def by_dimension(points: list[Point]) -> Iterator[tuple[str, list[Point]]]:
    """Dimensions in their order, with the points that were measured."""
    for name in TITLES:
        if found := [point for point in points if point.dimension == name and not point.left_out]:
            yield name, found


def table(points: list[Point], base_flops: float) -> str:
    """One line a point."""
    columns = ["dimension", "", "ms a step", "CPU ms a rank", "time of the base's", "FLOPs of the base's"]
    columns += ["GFLOP (nominal)", "tokens/s", "loss", "MiB", "forecast", "ratio", "as run"]

    def cells(point: Point, first: Point) -> list[str]:
        wall = point.has_wall_time
        return [
            TITLES[point.dimension],
            f"{point.value:,}",
            spread([1e3 * seconds for seconds in point.seconds], 0) if wall else "",
            spread([1e3 * seconds for seconds in point.cpu_seconds], 0),
            spread(ratio_to_base(point, first), 2),
            f"{point.flops / base_flops:.2f}",
            f"{point.flops / 1e9:,.1f} ({point.nominal_flops / 1e9:,.1f})",
            f"{point.tokens / point.second:,.0f}" if wall else "",
            f"{point.loss_share:.0%}",
            f"{point.peak_mib:,.0f}",
            f"{point.forecast_mib:,.0f}",
            f"{point.forecast_mib / point.peak_mib:.2f}",
            f"{point.kept_mib:,.0f}",
        ]

    measured = markdown(columns, (cells(point, those[0]) for _, those in by_dimension(points) for point in those))
    left_out = [f"\nLeft out: {TITLES[p.dimension]} {p.value:,}: {p.left_out}" for p in points if p.left_out]
    return "\n".join([measured, *left_out])


def loss_table(points: list[LossPoint]) -> str:
    """The loss alone."""

    def cells(p: LossPoint) -> list[str]:
        growth = p.num_rows * p.num_classes / (points[0].num_rows * points[0].num_classes)
        peaks = ["left out" if mib is None else f"{mib:,.0f}" for mib in (p.ours_mib, p.eager_mib)]
        return [f"{p.num_rows:,}", f"{p.num_classes:,}", f"{growth:.0f}", *peaks]

    columns = ["rows N", "classes V", "N x V, of the first", "MiB, ours", "MiB, eager logits"]
    return markdown(columns, map(cells, points))


def panels(points: list[Point], loss: list[LossPoint]) -> list[figures.GrowthPanel]:
    """Time and memory of each dimension, and the memory of the loss.

    The line of time is proportional to computed FLOPs, through the point that computes most in a second; that of
    ranks is the CPU time of one.
    """
    found = []
    for name, those in by_dimension(points):
        if name == "num_ranks":
            measured = {"CPU ms of a rank": [(p.value, 1e3 * p.cpu_second) for p in those]}
            expected = {"as one rank": [(p.value, 1e3 * those[0].cpu_second) for p in those]}
        else:
            rate = min(p.second / p.flops for p in those)
            measured = {"measured": [(p.value, 1e3 * p.second) for p in those]}
            expected = {"as the FLOPs": [(p.value, 1e3 * rate * p.flops) for p in those]}
        found.append(figures.GrowthPanel(TITLES[name], "ms a step", measured, expected))
        memory = {"measured": [(p.value, p.peak_mib) for p in those]}
        forecasts = {"forecast": [(p.value, p.forecast_mib) for p in those]}
        found.append(figures.GrowthPanel(TITLES[name], "MiB above imports", memory, forecasts))
    if loss:
        peaks = {
            "ours": [(p.num_rows * p.num_classes, p.ours_mib) for p in loss if p.ours_mib is not None],
            "eager logits": [(p.num_rows * p.num_classes, p.eager_mib) for p in loss if p.eager_mib is not None],
        }
        one = [(p.num_rows * p.num_classes, 4 * p.num_rows * p.num_classes / MIB) for p in loss]
        found.append(figures.GrowthPanel("N x V", "MiB of the loss", peaks, {"one float32 copy": one}))
    return found


def write_figure(path: Path, points: list[Point], loss: list[LossPoint]) -> None:
    """The panels as PNG or SVG."""
    figure = figures.draw_growth(panels(points, loss))
    if path.suffix == ".svg":
        path.write_text(figures.svg_text(figure, name="growth"), encoding="utf-8")
    else:
        path.write_bytes(figures.png_bytes(figure))


# ------------------------------------------------------------------------------------------------ the whole


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser(__doc__)
    on_gpu = torch.cuda.is_available()
    options.add_argument("--size", choices=sorted(SIZES), default="gpt_354m" if on_gpu else "cpu", help="the base")
    options.add_argument("--vary", nargs="+", choices=[*VALUES, "loss"], default=[*VALUES, "loss"], help="dimensions")
    options.add_argument("--turns", type=int, default=3, help="turns a point")
    options.add_argument("--steps", type=int, default=10 if on_gpu else 2, help="steps a turn")
    options.add_argument("--num_threads", type=int, default=0, help="of the CPU, but for ranks; 0 takes all cores")
    options.add_argument("--num_workers", type=int, default=1 if on_gpu else 0, help="loader processes a rank")
    options.add_argument("--ds_config", default="ds_configs/zero1.json", help="DeepSpeed's JSON")
    options.add_argument(
        "--minutes", type=float, help="begin no point after so many; called again with --out it goes on"
    )
    options.add_argument("--from", dest="source", type=Path, metavar="JSON", help="measure nothing, show this file")
    options.add_argument("--figure", type=Path, help="draw the results here, a .png or .svg")
    return options


def check(args: argparse.Namespace) -> None:
    """Raises UserError for values that make no sense."""
    check_at_least(args, turns=1, steps=1, num_threads=0, num_workers=0)
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g} must be above 0")
    if args.figure and args.figure.suffix not in (".png", ".svg"):
        raise UserError(f"--figure {args.figure} is neither a .png nor an .svg; give it one of these endings")
    for path in (args.out, args.figure):
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"{path} lies in no folder; make {path.parent} first")
    if args.source and args.out:
        raise UserError("--from shows a file and --out measures into one; give one of them")


def read(path: Path) -> tuple[dict[str, Any], list[Point], list[LossPoint]]:
    """(heading, points, points of the loss) of a file of results. Raises UserError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points, _ = [Point(**each) for each in found.pop("points")], float(found["base_flops"])
        return found, points, [LossPoint(**each) for each in found.pop("loss")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as results of this tool ({error}); name another file") from None


def measure_all(args: argparse.Namespace, points: list[Point], loss: list[LossPoint], keep: Callable[[], None]) -> None:
    """Measure what is missing; `keep` after every point."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench_growth_") as name:
        options = (args.turns, args.steps, args.num_threads, args.num_workers, args.ds_config)
        sweep = Sweep(
            replace(SIZES[args.size], num_tokens=min(SIZES[args.size].num_tokens, 400_000)), *options, Path(name)
        )
        base_job = sweep.job(sweep.base, run_dir=f"{name}/run_base")
        done, base = {(point.dimension, point.value) for point in points}, None
        values = TINY_VALUES if args.size == "tiny" else VALUES
        wanted = [(d, v) for d in values if d in args.vary for v in values[d] if (d, v) not in done]
        try:
            for number, (dimension, value) in enumerate(wanted):
                if args.minutes and time.monotonic() - began > 60 * args.minutes:
                    print(f"{args.minutes:g} minutes are over: the rest is left to the next call", flush=True)
                    return
                print(f"{number + 1}/{len(wanted)} {TITLES[dimension]} {value:,}", end=": ", flush=True)
                if base is None and dimension != "num_ranks":
                    base = Ranks(base_job)
                    base.answers()
                point = Point(dimension, value)
                measure(sweep, point, base if dimension != "num_ranks" else None)
                points.append(point)
                keep()
                print(point.left_out or f"{1e3 * point.second:,.0f} ms, {point.peak_mib:,.0f} MiB", flush=True)
        finally:
            if base is not None:
                base.kill()
        if "loss" in args.vary and not loss:
            for each in loss_points(args.size):
                print(f"the loss at {each.num_rows:,} x {each.num_classes:,}", flush=True)
                measure_loss(each, sweep)
                loss.append(each)
            keep()


def show(head: dict[str, Any], points: list[Point], loss: list[LossPoint], figure: Path | None) -> None:
    """The figure; on the screen where it comes from, and the tables."""
    if figure:
        write_figure(figure, points, loss)
    print("\n" + ", ".join(f"{name} {value}" for name, value in head.items() if name not in ("base_flops", "command")))
    if points:
        print("\n" + table(points, head["base_flops"]))
    if loss:
        print("\n" + loss_table(loss))


@ends_cleanly
def main() -> None:
    """Command line; see --help."""
    args = options().parse_args()
    check(args)
    if args.source:
        show(*read(args.source), args.figure)
        return
    if args.size in GPU_SIZES and not torch.cuda.is_available():
        print(f"skipped: {args.size} (needs a GPU)")
        return
    cores = len(os.sched_getaffinity(0))
    head = heading(
        cores=cores,
        threads=args.num_threads or cores,
        size=f"{args.size}, {SIZES[args.size]}",
        base_flops=flops_of(SIZES[args.size])[0],
        settings=f"{args.turns} turns of {args.steps} steps, {args.ds_config}",
    )
    points: list[Point] = []
    loss: list[LossPoint] = []
    if args.out and args.out.exists():
        there, points, loss = read(args.out)
        for name, value in head.items():
            if name not in ("date", "command") and there.get(name) != value:
                raise UserError(
                    f"{args.out} was measured with {name} {there.get(name)}, not {value}; name another file"
                )
        print(f"{args.out} holds {len(points)} points: the others follow", flush=True)
        points = [point for point in points if not point.left_out]  # there may be more memory now
    measure_all(args, points, loss, lambda: write_results(args.out, head, points=points, loss=loss))
    show(head, points, loss, args.figure)


if __name__ == "__main__":
    sys.exit(main())
