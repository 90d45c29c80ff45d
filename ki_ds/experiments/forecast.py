"""What an experiment will cost, run by run, before any of it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from ki_ds.config import ModelConfig, RunConfig
from ki_ds.data.datasets import read_vocabulary
from ki_ds.experiments.recipes import configuration_of
from ki_ds.experiments.reproduce import PlannedExperiment
from ki_ds.jobs.chain import Job, Place
from ki_ds.jobs.supervisor import is_finished, saved_step
from ki_ds.planning.devices import device_named, peak_flops_of
from ki_ds.planning.planner import Plan, plan
from ki_ds.planning.sizes import size_of

COLUMNS = ("run", "after", "model", "parameters", "steps", "taught", "FLOPs", "hours", "memory", "disk", "state")


def forecast(
    planned: PlannedExperiment, place: Place, *, device: str | None, peak_flops: float | None, mfu: float
) -> dict[str, Plan]:
    """{job: its plan} for ranks of one place; sizes and errors as in `planner.plan`.

    Args:
        device: as `devices.device_named`, whose peak in a run's precision counts where no `peak_flops` is given.
    """
    name, on_gpu = device_named(device)
    configs = {str(job.run_dir): configuration_of(job) for job in planned.jobs}
    num_classes = _num_classes(planned, next(iter(configs.values()), None))
    found = {}
    for job in planned.jobs:
        config = configs[str(job.run_dir)]
        teachers = [configs[entry.path] for entry in config.all_teachers]
        found[job.name] = plan(
            config,
            num_ranks=place.num_ranks,
            num_classes=num_classes,
            teachers=[size_of(each.model, each.task, num_classes) for each in teachers],
            on_gpu=on_gpu,
            mfu=mfu,
            peak_flops=peak_flops_of(name, config.engine.precision) if peak_flops is None else peak_flops,
            model=_model(config, configs),
        )
    return found


def _num_classes(planned: PlannedExperiment, config: RunConfig | None) -> int:
    """Ids of the corpus where it is there, else of the tokenizer that the scale will train."""
    if config is None or not planned.texts.keys() < planned.corpora.keys():
        return planned.scale.vocab_size[planned.task]
    ready = next(path for domain, path in planned.corpora.items() if domain not in planned.texts)
    data = replace(config.data, corpus=str(ready), sources=None, valid=None)
    return read_vocabulary(data, config.task).size


def _model(config: RunConfig, configs: dict[str, RunConfig]) -> ModelConfig | None:
    """What a run is that starts from the weights of one that is not trained yet."""
    started_from = configs.get(str(Path(config.model.name).parent))
    return started_from.model if started_from else None


def forecast_table(planned: PlannedExperiment, places: Sequence[Place], plans: dict[str, Plan]) -> Table:
    """The runs in order with what each costs, and the sum of those that are not finished."""
    request, ranks = planned.request, places[0].num_ranks
    side_by_side = f"{len(places)} jobs side by side, " if len(places) > 1 else ""
    title = f"{planned.recipe.title}; scale {request.scale}, {side_by_side}{ranks} ranks each, in {request.out}"
    made = Table(title=title, title_justify="left")
    for name in COLUMNS:
        made.add_column(name, justify="left" if name in ("run", "after", "model", "state") else "right")
    for job in planned.jobs:
        made.add_row(*_row(planned, job, plans[job.name]))
    left = [plans[job.name] for job in planned.jobs if not is_finished(job.run_dir)]
    if planned.jobs:
        made.add_section()
        seconds = [each.seconds for each in left]
        disk = _bytes(sum(each.disk for each in left))
        sums = [f"{sum(each.flops for each in left):.3g}", _hours(seconds), "", disk]
        made.add_row("left to do", "", f"{len(left)} runs", "", "", "", *sums, "")
    return made


def device_hours(plans: Sequence[Plan]) -> float | None:
    """Hours of all devices together; None where no peak is known."""
    seconds = [each.seconds for each in plans]
    return None if None in seconds else sum(s * p.num_ranks for s, p in zip(seconds, plans, strict=True) if s) / 3600


def _row(planned: PlannedExperiment, job: Job, found: Plan) -> list[str]:
    step = saved_step(job.run_dir)
    state = "finished" if is_finished(job.run_dir) else f"from step {step:,}" if step else "to do"
    return [
        job.name,
        "\n".join(Path(folder).name for folder in job.after),
        planned.recipe.runs[job.run_dir.name].model,
        f"{found.parameters / 1e6:,.1f}M",
        f"{found.num_steps:,}",
        f"{found.num_taught_steps:,}" if found.teachers else "",
        f"{found.flops:.3g}",
        _hours([found.seconds]),
        _bytes(found.total_memory),
        _bytes(found.disk),
        state,
    ]


def _hours(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    return f"{sum(known) / 3600:,.1f}" if len(known) == len(seconds) else "?"


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
