"""A run before its first step: its folder, corpus, student, teacher and engine, and every check that can refuse it."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import ki_ds
from ki_ds import checkpoint, schedules
from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.data.batches import VALID_SEED, BlockDataset, MaskConfig, ValidBatches
from ki_ds.data.prepare import open_corpus as open_prepared
from ki_ds.data.store import TokenStore, open_store
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.distributed import is_main, on_main, rank, say, world_size
from ki_ds.engine import StudentEngine
from ki_ds.errors import UserError
from ki_ds.loss import resolve_backend
from ki_ds.metrics import Totals
from ki_ds.models import InheritanceModel, build_lm, count_parameters, max_positions
from ki_ds.signals import Teacher
from ki_ds.teachers.factory import TeacherFacts, make_teacher


@dataclass
class Corpus:
    """The student's data, and the hashes that make two runs comparable."""

    train: BlockDataset
    valid: BlockDataset
    tokenizer_dir: Path
    num_classes: int
    hashes: dict[str, str]


@dataclass
class Run:
    """Everything that the loop needs."""

    config: RunConfig
    device: torch.device
    engine: StudentEngine
    corpus: Corpus
    teacher: Teacher | None
    manifest: dict[str, Any]
    totals: Totals
    best_ce: float = math.inf
    valid: ValidBatches = field(init=False)

    def __post_init__(self) -> None:
        train, data = self.config.train, self.config.data
        self.valid = ValidBatches(
            self.corpus.valid,
            micro_batch_size=train.eval_micro_batch_size or train.micro_batch_size,
            rank=rank(),
            world_size=world_size(),
            max_samples=data.max_valid_samples,
            num_variants=data.valid_mask_variants,
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def inheriting_steps(self) -> int:
        return inheriting_steps(self.config)


def inheriting_steps(config: RunConfig) -> int:
    """Updates that use the teacher; from this step on alpha is 0 for good."""
    steps = configuration.inherit_steps(config)
    return schedules.last_inheriting_step(config.inherit.schedule, steps, config.train.num_steps)


def load_corpus(config: RunConfig) -> Corpus:
    """The run's training and validation blocks. Raises UserError when the folder is not a corpus of ours."""
    prepared = open_prepared(config.data.corpus)
    if prepared.valid_prefix is None:
        raise UserError(f"data.corpus={prepared.folder} has no validation part; prepare it with a valid_fraction")
    folder = prepared.folder
    stores = {"train": open_store(prepared.train_prefix), "valid": open_store(prepared.valid_prefix)}
    digest = tokenizer_hash(load_tokenizer(prepared.tokenizer_dir))
    hashes = {"tokenizer_sha256": digest}
    for name, store in stores.items():
        if store.manifest is None:
            raise UserError(f"{folder / name} has no manifest; prepare the data again with tools/prepare_data.py")
        if store.manifest.tokenizer_hash != digest:
            raise UserError(
                f"{folder / name} was made with another tokenizer than {folder / 'tokenizer'}; prepare it again"
            )
        hashes[f"{name}_sha256"] = store.manifest.bin_sha256
    train, valid = (_blocks(stores[name], config) for name in ("train", "valid"))
    return Corpus(train, valid, prepared.tokenizer_dir, train.vocab_size, hashes)


def _blocks(store: TokenStore, config: RunConfig) -> BlockDataset:
    data = config.data
    masking = MaskConfig(
        mask_prob=data.mask_probability, keep_prob=data.keep_probability, random_prob=data.random_probability
    )
    return BlockDataset(store, task=config.task, seq_len=data.seq_len, masking=masking)


def prepare(config: RunConfig, device: torch.device) -> Run:
    """The run, ready for its next step: everything that can be refused has been. Called by every rank.

    Raises:
        UserError: the folder, data, model, teacher or engine settings cannot be used.
    """
    run_dir = Path(config.run_dir)
    on_main(lambda: _check_folder(config, run_dir))
    corpus = load_corpus(config)
    on_main(lambda: checkpoint.restore_folder(run_dir / "best"))
    resume_from = checkpoint.newest_intact(run_dir / "checkpoints")
    done = checkpoint.read_json(resume_from / "state.json") if resume_from else {"step": 0}
    lm = build_lm(
        config.model,
        config.task,
        num_classes=corpus.num_classes,
        special_ids=corpus.train.special_ids,
        seed=config.seed,
    )
    _check_positions(config, max_positions(lm))
    parameters = count_parameters(lm)
    model = InheritanceModel(lm, num_classes=corpus.num_classes, loss=config.loss, tau=config.inherit.tau)
    model.check()
    teacher, facts = None, None
    if done["step"] < inheriting_steps(config):
        teacher, facts = make_teacher(
            config.teacher,
            config.task,
            tokenizer_sha256=corpus.hashes["tokenizer_sha256"],
            num_classes=corpus.num_classes,
            seq_len=config.data.seq_len,
            device=device,
        )
        if not facts.tokenizer_checked:
            say(f"{facts.path} has no tokenizer: of the teacher's vocabulary only the size could be checked")
    manifest = _manifest(config, corpus, parameters, facts, device)
    on_main(lambda: _check_lineage(run_dir, manifest))
    engine = StudentEngine(model, config, device=device)
    run = Run(config, device, engine, corpus, teacher, manifest, Totals())
    if resume_from:
        state = checkpoint.load(resume_from, engine)
        run.totals, run.best_ce = Totals(**state["totals"]), state["best_ce"]
        say(f"going on from {resume_from}")
    if is_main():
        configuration.save(config, run_dir / "config.yaml")
        checkpoint.write_json(run_dir / "run.json", manifest)
    return run


def _check_positions(config: RunConfig, limit: int | None) -> None:
    if limit is not None and config.data.seq_len > limit:
        raise UserError(
            f"data.seq_len={config.data.seq_len} exceeds the student's {limit} positions; "
            "lower it or take a longer model"
        )


def _check_folder(config: RunConfig, run_dir: Path) -> None:
    """UserError when the folder holds a run that computes something else, or something that is not a run."""
    saved = run_dir / "config.yaml"
    if not saved.exists():
        strangers = [p.name for p in run_dir.iterdir() if p.name != ".lock"]
        if strangers:
            raise UserError(f"run_dir={run_dir} holds {strangers[0]} but no run; give an empty or new folder")
        return
    changed = configuration.differences(configuration.load(saved), config)
    if changed and config.train.changed_config == "refuse":
        name, (old, new) = next(iter(changed.items()))
        raise UserError(
            f"run_dir={run_dir} holds a run with {name}={old}, now it is {new}; give another run_dir, "
            "or --train.changed_config allow to go on with the new value"
        )


def _check_lineage(run_dir: Path, manifest: dict[str, Any]) -> None:
    """UserError when data, tokenizer or teacher changed under a run."""
    path = run_dir / "run.json"
    if not path.exists():
        return
    before = checkpoint.read_json(path)
    for name, digest in manifest["data"].items():
        if before["data"][name] != digest:
            raise UserError(
                f"run_dir={run_dir}: {name} was {before['data'][name][:12]}, data.corpus has {digest[:12]}; "
                "give the run its own data back, or start in another run_dir"
            )
    old, new = before.get("teacher"), manifest["teacher"]
    allowed = manifest["changed_config"] == "allow"
    if old and new and not allowed and old["weights_sha256"] != new["weights_sha256"]:
        raise UserError(
            f"run_dir={run_dir} inherited from {old['path']}, teacher.path={new['path']} has other weights; "
            "give the same teacher, or --train.changed_config allow"
        )
    if old and not new:
        manifest["teacher"] = old  # alpha is 0 by now: the lineage stays


def _manifest(
    config: RunConfig, corpus: Corpus, parameters: dict[str, int], facts: TeacherFacts | None, device: torch.device
) -> dict[str, Any]:
    valid: dict[str, Any] = {
        "seed": VALID_SEED,
        "variants": config.data.valid_mask_variants,
        "seq_len": config.data.seq_len,
    }
    valid |= {"mask_probability": config.data.mask_probability, "max_samples": config.data.max_valid_samples}
    return {
        "name": Path(config.run_dir).name,
        "task": config.task,
        "status": "running",
        "version": ki_ds.__version__,
        "world_size": world_size(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "loss_backend": resolve_backend(config.loss.backend, device),
        "student": parameters,
        "teacher": asdict(facts) if facts else None,
        "inheriting_steps": inheriting_steps(config),
        "data": corpus.hashes,
        "valid_masks": valid,
        "changed_config": config.train.changed_config,
    }
