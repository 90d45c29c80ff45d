"""A run before its first step: its folder, data, student, teachers and engine, each refused in its own room."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ki_ds
from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint, lineage, run_folder
from ki_ds.config import RunConfig, schedules
from ki_ds.convert.folder import StudentFolder
from ki_ds.data.batches import VALID_SEED, TrainBatches, ValidBatches
from ki_ds.data.datasets import Datasets, open_datasets
from ki_ds.engine.student import StudentEngine
from ki_ds.models.presets import DTYPES, build_student, count_parameters, model_folder, weights_sha256
from ki_ds.objective.backend import resolve_backend
from ki_ds.ranks.bridge import Bridge
from ki_ds.ranks.world import is_main, on_main, rank, say, world_size
from ki_ds.reports.metrics import Totals, Window
from ki_ds.teachers.ranks import name_teachers, teachers_of_run
from ki_ds.teachers.teacher import Teacher, TeacherFacts
from ki_ds.training.handover import HandOver, taught_steps


@dataclass
class Run:
    """Everything that the loop needs."""

    config: RunConfig
    device: torch.device
    engine: StudentEngine
    data: Datasets
    valid: dict[str, ValidBatches]  # by domain
    teacher: Teacher | None
    facts: Sequence[TeacherFacts]  # of the teachers behind `teacher`, in their order; the same on every rank
    manifest: dict[str, Any]  # complete on rank 0
    exported: StudentFolder | None  # what is written beside the weights; on rank 0
    taught: range  # completed updates at which alpha can be above 0
    handover: HandOver | None  # of the schedule auto
    totals: Totals = field(default_factory=Totals)
    best_ce: float = math.inf
    window: Window = field(init=False)  # since the last line of metrics

    def __post_init__(self) -> None:
        self.window = self.new_window()

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def alpha(self) -> float | torch.Tensor:
        """The inheritance rate of the next update; a tensor on the device where the student's progress decides it."""
        inherit, t = self.config.inherit, self.totals.step
        if self.handover is not None and t >= inherit.start_step:
            return self.handover.alpha
        return schedules.alpha(
            t,
            schedule=inherit.schedule,
            inherit_steps=configuration.inherit_steps(self.config),
            constant=inherit.constant_alpha,
            start_step=inherit.start_step,
        )

    @property
    def is_finished(self) -> bool:
        """Whether its last step is done."""
        return self.totals.step >= self.config.train.num_steps

    def batches(self, last: int) -> TrainBatches:
        """This rank's micro-batches of the steps from here to `last`."""
        steps, pinned = range(self.totals.step, last), self.device.type == "cuda"
        ranks = {"rank": rank(), "world_size": world_size()}
        return TrainBatches.of_run(self.config, self.data.train, steps=steps, **ranks, pin_memory=pinned)

    def record(self) -> None:
        """Write config.yaml, and run.json with the run's status."""
        if is_main():
            run_folder.record(self.config, self.manifest, finished=self.is_finished)

    def new_window(self) -> Window:
        """An empty window that begins now."""
        return Window(self.device, num_teachers=len(self.facts), seconds=self.totals.seconds)

    def notice_hand_over(self) -> None:
        """Under `auto`: end `taught` where the student has been left to itself. Waits for the device."""
        if self.handover is not None and (count := self.handover.taught_steps()) is not None:
            self.taught = taught_steps(self.config, self.handover)
            self.manifest["inherit"]["steps"] = self.manifest["inheriting_steps"] = count

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the engine's state, as JSON."""
        state = {"totals": asdict(self.totals), "window": self.window.state(), "best_ce": self.best_ce}
        return state if self.handover is None else state | {"handover": self.handover.saved()}

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. UserError when the engine cannot."""
        state = checkpoint.load(folder, self.engine)
        self.totals, self.best_ce = Totals(**state["totals"]), state["best_ce"]
        self.window = self.new_window()
        if "window" in state:
            self.window.restore(state["window"])
        say(f"going on from {folder}")


def load_data(config: RunConfig) -> Datasets:
    """The run's samples; rank 0 goes first, and leaves what takes long where the others find it."""

    def load() -> Datasets:
        return open_datasets(config.data, config.task, other_index_dir=Path(config.run_dir) / "index")

    return on_main(load) or load()


def prepare(config: RunConfig, device: torch.device, bridge: Bridge | None = None) -> Run:
    """The run, ready for its next step: everything that can be refused has been. Called by every rank.

    Raises:
        UserError: the folder, data, model, teacher or engine settings cannot be used.
    """
    run_dir = Path(config.run_dir)
    on_main(lambda: run_folder.check(config))
    data = load_data(config)
    for note in data.notes:
        say(note)
    on_main(lambda: checkpoint.clear_folder(run_dir / "best"))
    resume_from, saved = run_folder.newest_state(config)
    model = build_student(config, data)
    parameters, dtype = count_parameters(model.lm), DTYPES[config.engine.precision]
    exported = on_main(lambda: StudentFolder.of(model.lm, config.task, data.vocabulary, dtype=dtype))
    named = name_teachers(config, bridge)
    had = on_main(lambda: _lineage_so_far(config, data, named, parameters)) or {}
    handover = HandOver.of_run(config, saved, lineage.identities(named), device)
    taught = taught_steps(config, handover)
    teacher, facts = teachers_of_run(config, data, named, device, bridge, step=saved["step"], taught=taught)
    engine = StudentEngine(model, config, device=device)
    manifest = _manifest(config, data, parameters, device) | _lineage(had, facts)
    run = Run(config, device, engine, data, _valid(config, data), teacher, facts, manifest, exported, taught, handover)
    run.notice_hand_over()
    if resume_from:
        run.resume(resume_from)
    run.record()
    return run


def _lineage_so_far(
    config: RunConfig, data: Datasets, named: Sequence[dict[str, Any]], parameters: dict[str, int]
) -> dict[str, Any]:
    """The teachers that the run had and what it started from. UserError when data or teachers changed under it."""
    allowed = config.train.changed_config == "allow"
    had = lineage.check_run(Path(config.run_dir), data.hashes, named, other_teachers=allowed)
    return had or {"teachers": [], "former_teachers": [], "started_from": _started_from(config, parameters)}


def _lineage(had: dict[str, Any], facts: Sequence[TeacherFacts]) -> dict[str, Any]:
    """Teachers, former teachers and start of the run, whose teachers are its own still when nobody asks any."""
    teachers = [asdict(known) for known in facts]
    weights = {known.weights_sha256 for known in facts}
    gone = [known for known in had.get("teachers", []) if facts and known["weights_sha256"] not in weights]
    return {
        "started_from": had.get("started_from"),
        "teachers": teachers or had.get("teachers", []),
        "former_teachers": [*had.get("former_teachers", []), *gone],
    }


def _started_from(config: RunConfig, parameters: dict[str, int]) -> dict[str, Any] | None:
    """What the student's first weights were; None for random ones."""
    if config.model.init == "random":
        return None
    folder = Path(model_folder(config.model.name))
    digest = weights_sha256(str(folder)) if folder.is_dir() else None
    return {
        "path": config.model.name,
        "weights_sha256": digest,
        "num_parameters": parameters["num_parameters"],
        "lineage": lineage.read(folder, digest),
    }


def measured_domains(data: Datasets) -> tuple[str, ...]:
    """Domains whose rows make the run's validation perplexity: those that it trains on; all where none is measured."""
    return tuple(domain for domain in data.valid if domain in data.trained_domains) or tuple(data.valid)


def _valid(config: RunConfig, data: Datasets) -> dict[str, ValidBatches]:
    """This rank's validation batches of each domain."""
    return {
        domain: ValidBatches(
            dataset,
            micro_batch_size=config.train.eval_micro_batch_size or config.train.micro_batch_size,
            rank=rank(),
            world_size=world_size(),
            max_samples=config.data.max_valid_samples,
            num_variants=config.data.valid_mask_variants,
        )
        for domain, dataset in data.valid.items()
    }


def _manifest(config: RunConfig, data: Datasets, parameters: dict[str, int], device: torch.device) -> dict[str, Any]:
    """What run.json says of the run, but for its status and lineage."""
    valid = {
        "seed": VALID_SEED,
        "variants": config.data.valid_mask_variants,
        "seq_len": config.data.seq_len,
        "max_samples": config.data.max_valid_samples,
    }
    for name in ("mask_probability", "whole_words", "break_mode", "long_lines"):
        valid[name] = getattr(config.data, name)
    return {
        "name": Path(config.run_dir).name,
        "task": config.task,
        "version": ki_ds.__version__,
        "world_size": world_size(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "loss_backend": resolve_backend(config.loss.backend, device),
        "seed": config.seed,
        "student": parameters,
        "inherit": {
            "schedule": config.inherit.schedule,
            "steps": configuration.inherit_steps(config),
            "tau": config.inherit.tau,
        },
        "inheriting_steps": len(schedules.taught_steps(config)),
        "data": data.hashes,
        "domains": list(data.domains),
        "valid_domains": list(measured_domains(data)),
        "valid_masks": valid,
        "changed_config": config.train.changed_config,
    }
