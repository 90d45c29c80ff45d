"""The loop: batch, teacher's signal, student's loss, backward, step, metrics.

`main` is what every launcher calls, once a rank. Everything that can be refused is refused before the first step.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

import ki_ds
from ki_ds import checkpoint, schedules
from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.data.batches import VALID_SEED, Batch, BlockDataset, MaskConfig, TrainBatches, ValidBatches
from ki_ds.data.prepare import open_corpus as open_prepared
from ki_ds.data.store import TokenStore, open_store
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.distributed import is_main, leave, rank, say, together, world_size
from ki_ds.engine import StudentEngine, start
from ki_ds.errors import UserError, ends_cleanly
from ki_ds.evaluation.perplexity import Perplexity, validate
from ki_ds.loss import resolve_backend
from ki_ds.metrics import Display, MetricsLog, Stopwatch, Totals, Window, global_rows
from ki_ds.models import InheritanceModel, build_lm, count_parameters, max_positions
from ki_ds.signals import Teacher
from ki_ds.teachers.factory import TeacherFacts, make_teacher

Result = TypeVar("Result")


def main(argv: list[str]) -> int:
    """Train the run that the command line describes; the exit code. In a distributed run it does not return."""
    started = time.monotonic()
    code = ends_cleanly(lambda: train(_common(lambda: configuration.parse(argv)), started=started))()
    leave(code)
    return code


def train(config: RunConfig, *, started: float | None = None) -> None:
    """Train (or go on with) a run until its last step. Called by every rank.

    Raises:
        UserError: the configuration, the data, the teacher or the run folder cannot be used.
    """
    device = _common(lambda: start(config.engine))
    run_dir = Path(config.run_dir)
    with _claimed(run_dir):
        run = _common(lambda: _prepare(config, device))
        if run.totals.step >= config.train.num_steps:
            say(f"{run_dir} is finished: step {run.totals.step}, best valid ppl {math.exp(run.best_ce):.2f}")
            return
        if started is not None:
            say(f"first step after {time.monotonic() - started:.1f} s")
        _loop(run)
        run.engine.close()


@contextlib.contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """checkpoint.claimed on rank 0; every rank learns of a refusal."""
    with contextlib.ExitStack() as stack:
        together(_error_of(lambda: stack.enter_context(checkpoint.claimed(run_dir))) if is_main() else None)
        yield


# --- before the first step --------------------------------------------------------------------------------------


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
        """Updates that use the teacher; from this step on alpha is 0 for good."""
        return _inheriting_steps(self.config)


def _inheriting_steps(config: RunConfig) -> int:
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


def _prepare(config: RunConfig, device: torch.device) -> Run:
    run_dir = Path(config.run_dir)
    together(_error_of(lambda: _check_folder(config, run_dir)) if is_main() else None)
    corpus = load_corpus(config)
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
    if done["step"] < _inheriting_steps(config):
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
    together(_error_of(lambda: _check_lineage(run_dir, manifest)) if is_main() else None)
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


def _common(part: Callable[[], Result]) -> Result:
    """part(), which every rank does alike: an error of it is an error of all, and rank 0 prints it."""
    try:
        return part()
    except UserError as error:
        error.said_by_main = True
        raise


def _error_of(check: Callable[[], object]) -> UserError | None:
    try:
        check()
    except UserError as error:
        return error
    return None


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
        "inheriting_steps": _inheriting_steps(config),
        "data": corpus.hashes,
        "valid_masks": valid,
        "changed_config": config.train.changed_config,
    }


# --- the loop ---------------------------------------------------------------------------------------------------


def _loop(run: Run) -> None:
    config, totals = run.config, run.totals
    last = min(config.train.stop_at_step or config.train.num_steps, config.train.num_steps)
    say(f"loss backend: {run.manifest['loss_backend']}")
    log = MetricsLog(run.run_dir / "metrics.jsonl", resume_step=totals.step)
    display = Display(
        config.monitor.progress, title=run.run_dir.name, num_steps=config.train.num_steps, start_step=totals.step
    )
    watch, window = Stopwatch(totals.seconds), Window(run.device)
    with contextlib.closing(display):
        if totals.step == 0:
            _validate(run, log, display)
        watch.run()
        for micro_batches in _batches(run, last):
            if run.teacher is not None and totals.step >= run.inheriting_steps:
                _free_teacher(run, log)
            rates = train_step(run, micro_batches, window)
            totals.step += 1
            totals.samples += config.train.global_batch_size
            display.advance(totals.step)
            at_end = totals.step == last
            if at_end or _due(totals.step, config.train.log_every, config.train.eval_every):
                _report(run, log, display, watch, window, rates)
                window = Window(run.device)
            if at_end or _due(totals.step, config.train.eval_every):
                _validate(run, log, display)
            if at_end or _due(totals.step, config.train.save_every):
                totals.seconds = watch.pause()
                _save(run)
            watch.run()
    _finish(run, last)


def _due(step: int, *every: int) -> bool:
    return any(step % n == 0 for n in every)


def _batches(run: Run, last: int) -> TrainBatches:
    train = run.config.train
    return TrainBatches(
        run.corpus.train,
        seed=run.config.seed,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=run.config.data.num_workers,
        start_step=run.totals.step,
        num_steps=last,
        pin_memory=run.device.type == "cuda",
    )


def train_step(run: Run, micro_batches: list[Batch], window: Window) -> dict[str, float]:
    """One update from one global batch; {alpha, lr} that it used. No host sync."""
    t, config = run.totals.step, run.config
    inherit_steps = configuration.inherit_steps(config)
    alpha = schedules.alpha(
        t, schedule=config.inherit.schedule, inherit_steps=inherit_steps, constant=config.inherit.constant_alpha
    )
    lr = schedules.learning_rate(
        t, peak=config.optim.lr, num_steps=config.train.num_steps, warmup_fraction=config.optim.warmup_fraction
    )
    rows = global_rows(sum(batch.num_rows for batch in micro_batches), run.device)
    for micro_step, batch in enumerate(micro_batches):
        _seed_dropout(config.seed, t, micro_step)
        batch = batch.to(run.device, non_blocking=True)
        signal = run.teacher.signal(batch) if run.teacher is not None and alpha > 0 else None
        out = run.engine.loss(batch, signal, alpha)
        run.engine.backward(out.loss_sum, rows)
        run.engine.step(lr)
        window.add(out, batch.num_tokens, taught=signal is not None)
    return {"alpha": alpha, "lr": lr}


def _seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Make dropout a function of (seed, step, micro step, rank), so that a resumed run drops the same."""
    words = np.random.SeedSequence((seed, step, micro_step, rank())).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)


def _free_teacher(run: Run, log: MetricsLog) -> None:
    assert run.teacher is not None
    before = _memory_bytes()
    run.teacher.free()
    run.teacher = None
    log.write("teacher_freed", run.totals, bytes_before=before, bytes_after=_memory_bytes())


def _memory_bytes() -> int:
    """Bytes that this rank holds: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _report(
    run: Run, log: MetricsLog, display: Display, watch: Stopwatch, window: Window, rate: dict[str, float]
) -> None:
    totals, before = run.totals, run.totals.seconds
    figures, tokens, taught = window.close()
    totals.seconds = watch.pause()
    totals.tokens += tokens
    totals.student_flops += 6.0 * run.manifest["student"]["dense_parameters"] * tokens
    if taught:
        totals.teacher_flops += 2.0 * run.manifest["teacher"]["dense_parameters"] * taught
    figures |= rate | {"tokens_per_second": tokens / max(totals.seconds - before, 1e-9)}
    if (norm := run.engine.grad_norm) is not None:
        figures["grad_norm"] = norm
    log.write("train", totals, **figures, skipped_steps=run.engine.skipped_steps)
    run.engine.write_monitor([(f"train/{name}", value, totals.samples) for name, value in figures.items()])
    display.figures(totals.step, figures)
    if not math.isfinite(figures["loss"]):
        raise UserError(
            f"the loss is {figures['loss']} at step {totals.step}; lower optim.lr={run.config.optim.lr} and start "
            "again from the last checkpoint"
        )


def _validate(run: Run, log: MetricsLog, display: Display) -> None:
    result = validate(run.valid, run.engine.evaluate, device=run.device)
    figures = {**asdict(result), "ce": result.ce, "ppl": result.ppl}
    log.write("valid", run.totals, **figures)
    run.engine.write_monitor([(f"valid/{name}", figures[name], run.totals.samples) for name in ("ce", "ppl")])
    display.validation(run.totals.step, result.ppl)
    if result.ce < run.best_ce:
        run.best_ce = result.ce
        checkpoint.replace_folder(run.run_dir / "best", lambda folder: _export(run, folder, result))


def _export(run: Run, folder: Path, result: Perplexity | None = None) -> None:
    """Write the student as a Hugging Face folder with its tokenizer. Called by all ranks."""
    state = run.engine.state_dict()
    if not is_main():
        return
    lm = run.engine.model.lm
    lm.config.use_cache = True  # of no use in training, but whoever generates with the exported model wants it
    lm.save_pretrained(folder, state_dict=state)
    lm.config.use_cache = False
    for file in run.corpus.tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if result is not None:
        checkpoint.write_json(folder / "valid.json", {"step": run.totals.step, **asdict(result), "ppl": result.ppl})


def _save(run: Run) -> None:
    state = {"totals": asdict(run.totals), "best_ce": run.best_ce}
    checkpoint.save(
        run.run_dir / "checkpoints",
        run.totals.step,
        run.engine,
        state,
        lambda folder: _export(run, folder),
        keep=run.config.train.keep_checkpoints,
    )


def _finish(run: Run, last: int) -> None:
    finished = last == run.config.train.num_steps
    if is_main() and finished:
        checkpoint.write_json(run.run_dir / "run.json", {**run.manifest, "status": "finished"})
    what = "finished" if finished else f"stopped at step {last} as asked; call it again to go on"
    say(f"{run.run_dir}: {what}; best valid ppl {math.exp(run.best_ce):.2f}")
