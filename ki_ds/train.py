"""The loop: batch, teacher's signal, student's loss, backward, step, metrics."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch

from ki_ds import checkpoint, lineage, schedules
from ki_ds import config as configuration
from ki_ds.config import RunConfig
from ki_ds.data.batches import Batch, TrainBatches
from ki_ds.distributed import is_main, on_main, rank, say, world_size
from ki_ds.engine import connect
from ki_ds.errors import UserError, common_to_all_ranks
from ki_ds.evaluation.perplexity import Perplexity, validate
from ki_ds.metrics import Display, MetricsLog, Stopwatch, Window, global_rows
from ki_ds.models import weights_sha256
from ki_ds.profiling import each, part, profiled_steps
from ki_ds.run import Run, prepare
from ki_ds.teachers.ranks import teach


def train(config: RunConfig, *, started: float | None = None) -> None:
    """Train (or go on with) a run until its last step. Called by every rank.

    Raises:
        UserError: the configuration, the data, the teacher or the run folder cannot be used.
    """
    with common_to_all_ranks():
        ranks = config.teacher.num_ranks if config.teacher.placement == "ranks" else 0
        device, bridge = connect(config.engine, num_teacher_ranks=ranks)
    if bridge is not None and bridge.is_teacher:
        teach(config, bridge, device)
        return
    run_dir = Path(config.run_dir)
    with _claimed(run_dir):
        with common_to_all_ranks():
            run = prepare(config, device, bridge)
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
        on_main(lambda: stack.enter_context(checkpoint.claimed(run_dir)))
        yield


def _loop(run: Run) -> None:
    config, totals = run.config, run.totals
    last = min(config.train.stop_at_step or config.train.num_steps, config.train.num_steps)
    say(f"loss backend: {run.manifest['loss_backend']}")
    log = MetricsLog(run.run_dir / "metrics.jsonl", resume_step=totals.step)
    display = Display(
        config.monitor.progress, title=run.run_dir.name, num_steps=config.train.num_steps, start_step=totals.step
    )
    watch, window = Stopwatch(totals.seconds), Window(run.device)
    with (
        contextlib.closing(display),
        profiled_steps(config.monitor.profile_steps if is_main() else 0, run.run_dir / "profile") as count_step,
    ):
        if totals.step == 0:
            _validate(run, log, display)
        watch.run()
        for micro_batches in each("data", _batches(run, last)):
            if run.teacher is not None and totals.step >= run.taught.stop:
                _free_teacher(run, log)
            rates = train_step(run, micro_batches, window)
            totals.step += 1
            count_step()
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
        run.data.train,
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
    alpha = schedules.alpha(
        t,
        schedule=config.inherit.schedule,
        inherit_steps=configuration.inherit_steps(config),
        constant=config.inherit.constant_alpha,
        start_step=config.inherit.start_step,
    )
    lr = schedules.learning_rate(
        t, peak=config.optim.lr, num_steps=config.train.num_steps, warmup_fraction=config.optim.warmup_fraction
    )
    rows = global_rows(sum(batch.num_rows for batch in micro_batches), run.device)
    for micro_step, batch in enumerate(micro_batches):
        _seed_dropout(config.seed, t, micro_step)
        batch = batch.to(run.device, non_blocking=True)
        with part("teacher"):
            signal = run.teacher.signal(batch) if run.teacher is not None and alpha > 0 else None
        with part("student forward"):
            out = run.engine.loss(batch, signal, alpha)
        with part("backward"):
            run.engine.backward(out.loss_sum, rows)
        with part("optimizer"):
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
    if run.teacher is not None:
        figures |= run.teacher.figures()
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
    """Measure every domain; the figures of the run, and its best weights, are those of the domains it trains on."""
    by_domain = {
        domain: validate(batches, run.engine.evaluate, device=run.device) for domain, batches in run.valid.items()
    }
    trained = [found for domain, found in by_domain.items() if domain in run.data.trained_domains]
    result = Perplexity.together(trained or by_domain.values())
    domains = {domain: found.figures for domain, found in by_domain.items()} if len(by_domain) > 1 else {}
    log.write("valid", run.totals, **result.figures, **({"domains": domains} if domains else {}))
    measured = {"valid": result.figures} | {f"valid/{domain}": figures for domain, figures in domains.items()}
    values = [(f"{name}/{key}", figures[key]) for name, figures in measured.items() for key in ("ce", "ppl")]
    run.engine.write_monitor([(name, value, run.totals.samples) for name, value in values])
    display.validation(run.totals.step, result.ppl, {domain: found.ppl for domain, found in by_domain.items()})
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
    run.data.vocabulary.export(folder)
    totals = run.totals
    record = lineage.describe(
        run.manifest,
        step=totals.step,
        tokens=totals.tokens,
        flops=(totals.student_flops, totals.teacher_flops),
        ppl=result.ppl if result is not None else None,
        weights=weights_sha256(str(folder)),
    )
    checkpoint.write_json(folder / lineage.FILE_NAME, record)
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
