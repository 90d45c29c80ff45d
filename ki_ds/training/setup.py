"""A run before its first step: its folder, corpus, student, teacher and engine, and every check that can refuse it."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import ki_ds
from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint, lineage
from ki_ds.config import RunConfig, schedules
from ki_ds.convert.student import StudentFolder
from ki_ds.data.batches import VALID_SEED, ValidBatches
from ki_ds.data.datasets import Datasets, open_datasets
from ki_ds.engine.student import StudentEngine
from ki_ds.errors import UserError
from ki_ds.files import read_json, write_atomically, write_json
from ki_ds.models.presets import (
    DTYPES,
    InheritanceModel,
    Rows,
    build_lm,
    count_parameters,
    max_positions,
    model_folder,
    weights_sha256,
)
from ki_ds.objective.backend import resolve_backend
from ki_ds.ranks.bridge import Bridge
from ki_ds.ranks.world import from_main, is_main, on_main, rank, say, world_size
from ki_ds.reports.metrics import Totals, Window
from ki_ds.teachers.factory import TeacherFacts, identify_teachers, make_teachers
from ki_ds.teachers.questions import Questions
from ki_ds.teachers.ranks import connect_teachers, meet_teachers
from ki_ds.teachers.teacher import Teacher
from ki_ds.training.handover import HandOver


@dataclass
class Run:
    """Everything that the loop needs."""

    config: RunConfig
    device: torch.device
    engine: StudentEngine
    data: Datasets
    teacher: Teacher | None
    facts: Sequence[TeacherFacts]  # of the teachers behind `teacher`, in their order; the same on every rank
    manifest: dict[str, Any]  # complete on rank 0
    totals: Totals
    exported: StudentFolder | None  # what is written beside the weights; on rank 0
    handover: HandOver | None = None  # of the schedule auto
    best_ce: float = math.inf
    window: Window = field(init=False)  # since the last line of metrics
    taught: range = field(init=False)  # completed updates at which alpha can be above 0
    valid: dict[str, ValidBatches] = field(init=False)

    def __post_init__(self) -> None:
        train, data = self.config.train, self.config.data
        self.window = self.new_window()
        self.taught = _taught(self.config, self.handover)
        self.valid = {
            domain: ValidBatches(
                dataset,
                micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
                rank=rank(),
                world_size=world_size(),
                max_samples=data.max_valid_samples,
                num_variants=data.valid_mask_variants,
            )
            for domain, dataset in self.data.valid.items()
        }

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

    def record(self) -> None:
        """Write config.yaml, and run.json with the status, which only this says; what is finished keeps what it has."""
        path = self.run_dir / "run.json"
        if not is_main() or (self.is_finished and path.exists() and read_json(path, "status")["status"] == "finished"):
            return
        write_atomically(self.run_dir / "config.yaml", configuration.to_yaml(self.config))
        write_json(path, {"status": "finished" if self.is_finished else "running", **self.manifest})

    def new_window(self) -> Window:
        """An empty window that begins now."""
        return Window(self.device, num_teachers=len(self.facts), seconds=self.totals.seconds)

    def notice_hand_over(self) -> None:
        """Under `auto`: end `taught` where the student has been left to itself. Waits for the device."""
        if self.handover is not None and (count := self.handover.taught_steps()) is not None:
            self.taught = _taught(self.config, self.handover)
            self.manifest["inherit"]["steps"] = self.manifest["inheriting_steps"] = count


def load_data(config: RunConfig) -> Datasets:
    """The run's samples; rank 0 goes first, and leaves what takes long where the others find it."""
    opened: list[Datasets] = []

    def open_here() -> None:
        opened.append(open_datasets(config.data, config.task, other_index_dir=Path(config.run_dir) / "index"))

    on_main(open_here)
    if not opened:
        open_here()
    return opened[0]


def prepare(config: RunConfig, device: torch.device, bridge: Bridge | None = None) -> Run:
    """The run, ready for its next step: everything that can be refused has been. Called by every rank.

    Raises:
        UserError: the folder, data, model, teacher or engine settings cannot be used.
    """
    run_dir = Path(config.run_dir)
    on_main(lambda: _check_folder(config, run_dir))
    data = load_data(config)
    for note in data.notes:
        say(note)
    on_main(lambda: checkpoint.clear_folder(run_dir / "best"))
    resume_from = checkpoint.newest_intact(run_dir / "checkpoints")
    done = read_json(resume_from / "state.json") if resume_from else {"step": 0}
    _check_steps(config, run_dir, done["step"])
    lm = build_lm(
        config.model,
        config.task,
        num_classes=data.vocabulary.size,
        special_ids=data.vocabulary.special_ids,
        seed=config.seed,
    )
    _check_positions(config, max_positions(lm))
    parameters = count_parameters(lm)
    model = InheritanceModel(lm, num_classes=data.vocabulary.size, loss=config.loss, tau=config.inherit.tau)
    rows = Rows(config.task, config.data.seq_len, data.padded, config.data.packing, data.train.pad_id)
    model.check(rows)
    for note in model.check_training(rows):
        say(note)
    exported = _exported(lm, config, data)
    teacher: Teacher | None = None
    facts: list[TeacherFacts] = []
    if bridge is not None:
        facts = meet_teachers(config, bridge)
    named = _named_teachers(config, facts, done["step"])
    handover = _handover(config, done, named, device)
    taught = _taught(config, handover)
    over = done["step"] >= taught.stop
    if bridge is not None:
        step = config.train.num_steps if over else done["step"]
        teacher = connect_teachers(config, data.domains, bridge, device, step=step)
    elif not over:
        questions = Questions.of_run(config, data, steps=range(max(done["step"], taught.start), taught.stop))
        teacher, facts = make_teachers(config, data, device=device, questions=questions)
        named = [asdict(found) for found in facts]
    _check_handover(config, facts)
    for note in _teacher_notes(config, data, facts):
        say(note)
    if over and done["step"] < config.train.num_steps:
        for entry in config.all_teachers:
            say(f"the teacher {entry.path} is not asked: alpha is 0 from step {done['step'] + 1} on")
    started_from = _started_from(config, parameters) if not resume_from else None  # then the manifest knows it
    manifest = _manifest(config, data, parameters, facts, started_from, device)
    on_main(lambda: _check_lineage(run_dir, manifest, named, over=over))
    engine = StudentEngine(model, config, device=device)
    run = Run(config, device, engine, data, teacher, facts, manifest, Totals(), exported, handover)
    run.notice_hand_over()
    if resume_from:
        state = checkpoint.load(resume_from, engine)
        run.totals, run.best_ce = Totals(**state["totals"]), state["best_ce"]
        run.window = run.new_window()
        if "window" in state:
            run.window.restore(state["window"])
        say(f"going on from {resume_from}")
    run.record()
    return run


def _exported(lm: PreTrainedModel, config: RunConfig, data: Datasets) -> StudentFolder | None:
    """What rank 0 exports the student with; refused here rather than at the first export."""
    made: list[StudentFolder] = []
    dtype = DTYPES[config.engine.precision]
    on_main(lambda: made.append(StudentFolder.of(lm, config.task, data.vocabulary, dtype=dtype)))
    return made[0] if made else None


def _teacher_notes(config: RunConfig, data: Datasets, facts: Sequence[TeacherFacts]) -> Iterator[str]:
    for found in facts:
        if not found.tokenizer_checked:
            yield f"{found.path} has no tokenizer: of the teacher's vocabulary only the size could be checked"
    taught = {domain for entry in config.all_teachers for domain in entry.domains or data.trained_domains}
    if facts and (alone := [domain for domain in data.trained_domains if domain not in taught]):
        yield f"rows of {', '.join(alone)} have no teacher: they learn from their labels alone"


def _named_teachers(config: RunConfig, facts: Sequence[TeacherFacts], step: int) -> list[dict[str, Any]]:
    """What tells the named teachers from others, the same on every rank; nothing where those that are loaded will tell.

    Their weights decide whether the state of `auto` is theirs, and those that nobody asks any more stay the run's own.
    """
    if facts:  # of teacher ranks
        return [asdict(found) for found in facts]
    found: list[dict[str, Any]] = []
    if config.inherit.schedule == "auto" or step >= schedules.taught_steps(config).stop:
        on_main(lambda: found.extend(identify_teachers(config)))
    return from_main(found)


def _handover(
    config: RunConfig, done: dict[str, Any], named: Sequence[dict[str, Any]], device: torch.device
) -> HandOver | None:
    """The state of the schedule auto; of a checkpoint's only what belongs to the same period and teachers."""
    if config.inherit.schedule != "auto":
        return None
    return HandOver.resumed(
        done.get("handover"),
        device,
        step=done["step"],
        start_step=config.inherit.start_step,
        teachers=lineage.identities(named),
    )


def _taught(config: RunConfig, handover: HandOver | None) -> range:
    """The completed updates at which alpha can be above 0. Under `auto` waits for the device."""
    steps = schedules.taught_steps(config)
    if handover is None:
        return steps
    count = handover.taught_steps()
    return range(handover.first_step, steps.stop if count is None else handover.first_step + count)


def _check_handover(config: RunConfig, facts: Sequence[TeacherFacts]) -> None:
    for found in facts:
        if config.inherit.schedule == "auto" and found.cache is not None and found.cache["kind"] == "topk":
            raise UserError(
                f"inherit.schedule=auto compares the student with the whole teacher, and {found.cache['path']} holds K "
                "entries a row; cache hidden states (--kind hidden), or give another schedule"
            )


def _check_positions(config: RunConfig, limit: int | None) -> None:
    if limit is not None and config.data.seq_len > limit:
        raise UserError(
            f"data.seq_len={config.data.seq_len} exceeds the student's {limit} positions; "
            "lower it or take a longer model"
        )


def _check_folder(config: RunConfig, run_dir: Path) -> None:
    """UserError when the folder holds a run that computes something else, or something that is not a run.

    What a first start has left that was refused or killed before it saved anything is in nobody's way.
    """
    saved = run_dir / "config.yaml"
    if not saved.exists():
        strangers = [p.name for p in run_dir.iterdir() if p.name not in _of_first_start(config, run_dir)]
        if strangers:
            raise UserError(f"run_dir={run_dir} holds {strangers[0]} but no run; give an empty or new folder")
        return
    if not _holds_work(run_dir):
        (run_dir / "run.json").unlink(missing_ok=True)
        return
    changed = configuration.differences(configuration.load(saved, saved=True), config)
    if changed and config.train.changed_config == "refuse":
        name, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"run_dir={run_dir} holds a run with {name}={old}, now it is {new}; give another run_dir, "
            "or --train.changed_config allow to go on with the new value"
        )


def _of_first_start(config: RunConfig, run_dir: Path) -> set[str]:
    """Names that a start may leave in a run's folder before there is a config.yaml."""
    ours = {".lock", "index", "monitor", "config.yaml.tmp"}
    if config.data.index_dir is not None:
        index_dir, folder = Path(config.data.index_dir).resolve(), run_dir.resolve()
        if index_dir.is_relative_to(folder):
            ours.update(index_dir.relative_to(folder).parts[:1])
    return ours


def _holds_work(run_dir: Path) -> bool:
    """Whether there is something to go on from or to lose: checkpoints, or best weights of a later step than 0.

    Raises:
        UserError: it is finished, and its checkpoints were taken away.
    """
    if any((run_dir / "checkpoints").glob("step_*")):
        return True
    manifest, best = run_dir / "run.json", run_dir / "best" / "valid.json"
    if manifest.exists() and read_json(manifest, "status")["status"] == "finished":
        raise UserError(
            f"run_dir={run_dir} holds a finished run without its checkpoints, which would begin anew; restore one, or "
            "give another run_dir"
        )
    return best.exists() and read_json(best, "step")["step"] > 0


def _check_steps(config: RunConfig, run_dir: Path, step: int) -> None:
    if step > config.train.num_steps:
        raise UserError(
            f"run_dir={run_dir} is at step {step} already, past train.num_steps={config.train.num_steps}; raise it"
        )


def _check_lineage(run_dir: Path, manifest: dict[str, Any], named: Sequence[dict[str, Any]], *, over: bool) -> None:
    """UserError when data, tokenizer or teacher changed under a run.

    Args:
        named: the teachers of the configuration, asked or not.
        over: none of them is asked, for alpha is 0 by now.
    """
    if over:
        manifest["teachers"] = []
    path = run_dir / "run.json"
    if not path.exists():
        return
    before = read_json(path, "data")
    for name, digest in manifest["data"].items():
        if before["data"][name] != digest:
            raise UserError(
                f"run_dir={run_dir}: {name} was {before['data'][name][:12]}, data.corpus has {digest[:12]}; "
                "give the run its own data back, or start in another run_dir"
            )
    old, new = lineage.teachers_of(before), manifest["teachers"]
    manifest["former_teachers"] = before.get("former_teachers", [])
    manifest["started_from"] = before.get("started_from")
    if old and named and manifest["changed_config"] != "allow":
        _check_teachers(run_dir, old, named)
    if not new:
        manifest["teachers"] = old  # the lineage stays
        return
    still = {teacher["weights_sha256"] for teacher in new}
    gone = [teacher for teacher in old if teacher["weights_sha256"] not in still]
    manifest["former_teachers"] = [*manifest["former_teachers"], *gone]


def _check_teachers(run_dir: Path, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
    """UserError when the teachers of a run that goes on are not, one by one, those that it had."""
    if len(old) != len(new):
        raise UserError(
            f"run_dir={run_dir} inherited from {len(old)} teachers, now there are {len(new)}; give the same, or "
            "--train.changed_config allow"
        )
    for number, (before, now) in enumerate(zip(old, new, strict=True)):
        hub_names = {known["path"] for known in (before, now) if known["weights_sha256"] is None}
        if before["weights_sha256"] != now["weights_sha256"] or len(hub_names) > 1:
            field_name = "teacher.path" if now["name"] is None else f"teachers.{number}.path"
            raise UserError(
                f"run_dir={run_dir} inherited from {before['path']}, {field_name}={now['path']} has other weights; "
                "give the same teacher, or --train.changed_config allow"
            )
        _check_signals(run_dir, before, now)


def _check_signals(run_dir: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError when the same teacher would now say something else: another cache, or all where it said its top K."""
    before, after = old.get("cache"), new["cache"]
    entries = [cache is not None and cache["kind"] == "topk" for cache in (before, after)]
    if (before and after and before["key_sha256"] != after["key_sha256"]) or entries[0] != entries[1]:
        told = [
            f"the cache {cache['path']} ({cache['kind']}, key {cache['key_sha256'][:12]})" if cache else "the teacher"
            for cache in (before, after)
        ]
        raise UserError(
            f"run_dir={run_dir} inherited from {told[0]}, now it is {told[1]}; give the same, or "
            "--train.changed_config allow"
        )


def measured_domains(data: Datasets) -> tuple[str, ...]:
    """Domains whose rows make the run's validation perplexity: those that it trains on; all where none is measured."""
    return tuple(domain for domain in data.valid if domain in data.trained_domains) or tuple(data.valid)


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


def _manifest(
    config: RunConfig,
    data: Datasets,
    parameters: dict[str, int],
    facts: Sequence[TeacherFacts],
    started_from: dict[str, Any] | None,
    device: torch.device,
) -> dict[str, Any]:
    valid: dict[str, Any] = {
        "seed": VALID_SEED,
        "variants": config.data.valid_mask_variants,
        "seq_len": config.data.seq_len,
    }
    names = ("mask_probability", "whole_words", "break_mode", "long_lines")
    valid |= {"max_samples": config.data.max_valid_samples} | {name: getattr(config.data, name) for name in names}
    return {
        "name": Path(config.run_dir).name,
        "task": config.task,
        "version": ki_ds.__version__,
        "world_size": world_size(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "loss_backend": resolve_backend(config.loss.backend, device),
        "seed": config.seed,
        "student": parameters,
        "started_from": started_from,
        "teachers": [asdict(found) for found in facts],
        "former_teachers": [],
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
