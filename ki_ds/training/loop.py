"""The loop: batch, teacher's signal, student's loss, backward, step, metrics."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ki_ds.checkpoints import checkpoint, lineage
from ki_ds.checkpoints.checkpoint import Snapshot
from ki_ds.checkpoints.saver import Saver, as_it_is
from ki_ds.config import RunConfig, schedules
from ki_ds.data.batches import Batch, TrainBatches, with_next
from ki_ds.engine.guard import LONGEST_ROW
from ki_ds.engine.student import connect
from ki_ds.errors import ResumableError, UserError, common_to_all_ranks
from ki_ds.evaluation.perplexity import Perplexity, validate
from ki_ds.files import write_json
from ki_ds.objective.types import LossOutput
from ki_ds.ranks.bridge import Bridge
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.stragglers import Pace
from ki_ds.ranks.watchdog import Watchdog
from ki_ds.ranks.world import is_main, on_main, rank, say, world_size
from ki_ds.reports.metrics import Display, Figures, MetricsLog, Stopwatch, Window
from ki_ds.teachers.factory import TeacherFacts
from ki_ds.teachers.ranks import teach
from ki_ds.teachers.teacher import teacher_tokens
from ki_ds.training.profiling import each, part, profiled_steps
from ki_ds.training.setup import Run, measured_domains, prepare


def train(config: RunConfig, *, started: float | None = None) -> None:
    """Train (or go on with) a run until its last step. Called by every rank.

    Raises:
        UserError: the configuration, the data, the teacher or the run folder cannot be used.
        ResumableError: a signal asked the run to stop; it is saved.
    """
    checkpoint.keep_others_out()
    ranks = config.teacher.num_ranks if config.teacher.placement == "ranks" else 0
    device, bridge = connect(config.engine, num_teacher_ranks=ranks)
    preemption = Preemption()
    watchdog = Watchdog(
        bridge.rank if bridge else rank(),
        bridge.num_students + bridge.num_teachers if bridge else world_size(),
        preemption,
        config.engine.watchdog_seconds,
        teaches=bridge is not None and bridge.is_teacher,
    )
    with watchdog, watchdog.naming_lost_ranks():
        if bridge is not None and bridge.is_teacher:
            watchdog.at(0, "teaching", watched=False)
            with preemption.handled():  # its students learn of it and stop; then it leaves too
                teach(config, bridge, device)
        else:
            _train(config, device, bridge, preemption, watchdog, started)


def _train(
    config: RunConfig,
    device: torch.device,
    bridge: Bridge | None,
    preemption: Preemption,
    watchdog: Watchdog,
    started: float | None,
) -> None:
    run_dir = Path(config.run_dir)
    with checkpoint.naming_a_full_disk(run_dir), _claimed(run_dir):
        with common_to_all_ranks():
            run = prepare(config, device, bridge)
        if (why := _nothing_to_do(run)) is not None:
            say(why)
            return
        if started is not None:
            say(f"first step after {time.monotonic() - started:.1f} s")
        with preemption.handled():
            _loop(run, preemption, watchdog)
        run.engine.close()


def _nothing_to_do(run: Run) -> str | None:
    """The line that says why no step is left to do; None when there is one."""
    step, stop = run.totals.step, run.config.train.stop_at_step
    if run.is_finished:
        return f"{run.run_dir} is finished: step {step}, best valid ppl {math.exp(run.best_ce):.2f}"
    if stop is not None and step >= stop:
        return (
            f"{run.run_dir} is at step {step} already, train.stop_at_step={stop}: nothing was done; raise it to go on"
        )
    return None


@contextlib.contextmanager
def _claimed(run_dir: Path) -> Iterator[None]:
    """checkpoint.claimed on rank 0; every rank learns of a refusal."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(checkpoint.claimed(run_dir)))
        yield


def _loop(run: Run, preemption: Preemption, watchdog: Watchdog) -> None:
    config, totals = run.config, run.totals
    last = min(config.train.stop_at_step or config.train.num_steps, config.train.num_steps)
    say(f"loss backend: {run.manifest['loss_backend']}")
    log = MetricsLog(run.run_dir / "metrics.jsonl", resume_step=totals.step)
    on_main(lambda: run.engine.open_monitors(config.monitor, run.run_dir / "monitor", samples=totals.samples))
    display = Display(
        config.monitor.progress, title=run.run_dir.name, num_steps=config.train.num_steps, start_step=totals.step
    )
    watch = Stopwatch(totals.seconds)
    with (
        contextlib.closing(display),
        _saver(run, watchdog) as saver,
        profiled_steps(config.monitor.profile_steps if is_main() else 0, run.run_dir / "profile") as count_step,
    ):
        if totals.step == 0:
            _validate(run, log, display, watchdog)
        watch.run()
        watchdog.at(totals.step + 1, "training")
        pace = Pace(run.device)
        for micro_batches, upcoming in pace.loading(each("data", with_next(_batches(run, last)))):
            if run.teacher is not None and totals.step >= run.taught.stop:
                _settle(run, watch)
                _free_teacher(run, log)
                watch.run()
            rates = train_step(run, micro_batches, run.window, preemption, pace, upcoming=upcoming)
            totals.step += 1
            count_step()
            totals.samples += config.train.global_batch_size
            display.advance(totals.step)
            stopping = preemption.agreed() and totals.step < last
            at_end = stopping or totals.step == last
            if at_end or _due(totals.step, config.train.log_every, config.train.eval_every):
                _settle(run, watch)
                _report(run, log, display, rates)
                saver.look()
                if line := pace.report(totals.step):
                    say(line)
                    log.write("straggler", totals, line=line)
            if (at_end and not stopping) or _due(totals.step, config.train.eval_every):
                _validate(run, log, display, watchdog)
            if at_end or _due(totals.step, config.train.save_every):
                _settle(run, watch)
                watchdog.at(totals.step, "saving", watched=False)
                _save(run, saver, at_once=at_end)
            if stopping:
                _stop(run, preemption)
            watch.run()
            watchdog.at(totals.step + 1, "training")
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


def train_step(
    run: Run,
    micro_batches: list[Batch],
    window: Window,
    preemption: Preemption,
    pace: Pace,
    *,
    upcoming: list[Batch] | None = None,
) -> dict[str, float | Tensor]:
    """One update from one global batch; {alpha, lr} that it used. No host sync.

    Args:
        upcoming: the next global batch, if there is one; a teacher that answers ahead is asked about it.
    """
    t, config, alpha = run.totals.step, run.config, run.alpha
    lr = schedules.learning_rate(
        t, peak=config.optim.lr, num_steps=config.train.num_steps, warmup_fraction=config.optim.warmup_fraction
    )
    rows = preemption.global_rows(sum(batch.num_rows for batch in micro_batches), run.device)
    following = upcoming[0] if upcoming and t + 1 in run.taught else None
    for micro_step, (batch, next_batch) in enumerate(zip(micro_batches, [*micro_batches[1:], following], strict=True)):
        _seed_dropout(config.seed, t, micro_step)
        with part("teacher"), pace.computing(alone=config.teacher.placement != "ranks"):
            batch = batch.to(run.device, non_blocking=True)
            signal = run.teacher.signal(batch) if run.teacher is not None and t in run.taught else None
        if run.teacher is not None and next_batch is not None:
            run.teacher.ask(next_batch)
        with part("student forward"), pace.computing(alone=run.engine.zero_stage < 3):
            out, aux_loss = run.engine.loss(batch, signal, alpha)
        with part("backward"):
            run.engine.backward(out.loss_sum, rows, aux_loss)
        with part("optimizer"):
            run.engine.step(lr)
        window.add(out, batch.num_tokens, teacher_tokens=teacher_tokens(signal, batch), aux_loss=aux_loss)
        if run.handover is not None:
            run.handover.add(out.teachers)
    if run.handover is not None and t in run.taught:
        run.handover.settle()
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


def _settle(run: Run, watch: Stopwatch) -> None:
    """Bring the totals up to this step, and stop the watch. Called by all ranks; waits for the device."""
    totals = run.totals
    totals.seconds = watch.pause()
    tokens, teacher_tokens = run.window.settle()
    totals.tokens += tokens
    totals.student_flops = 6.0 * run.manifest["student"]["dense_parameters"] * totals.tokens
    for facts, asked in zip(run.facts, teacher_tokens, strict=True):
        totals.teacher_flops += 2.0 * facts.dense_parameters * asked
    run.notice_hand_over()


def _report(run: Run, log: MetricsLog, display: Display, rates: dict[str, float | Tensor]) -> None:
    """Write a line of metrics from settled totals, and begin the next window."""
    totals, found, before = run.totals, run.window.figures(), run.window.seconds
    run.window = run.new_window()
    figures = (
        found.means
        | {name: float(rate) for name, rate in rates.items()}
        | {"tokens_per_second": found.tokens / max(totals.seconds - before, 1e-9)}
    )
    if found.aux_loss is not None:
        figures["aux_loss"] = found.aux_loss
    if run.teacher is not None:
        figures |= run.teacher.figures()
    if len(found.teachers) == 1 and found.teachers[0]["rows"] and "teacher_ce" in found.teachers[0]:
        figures["teacher_ce"] = found.teachers[0]["teacher_ce"]
    if (norm := run.engine.grad_norm) is not None:
        figures["grad_norm"] = norm
    by_teacher = _by_teacher(run.facts, found)
    log.write(
        "train",
        totals,
        **figures,
        skipped_steps=run.engine.skipped_steps,
        bad_steps=run.engine.guard.read().num_bad,
        **({"teachers": by_teacher} if by_teacher else {}),
    )
    events = figures | {f"{name}/{key}": each[key] for name, each in by_teacher.items() for key in each}
    run.engine.write_monitor([(f"train/{name}", value, totals.samples) for name, value in events.items()])
    display.figures(totals.step, figures)
    _check_health(run)


def _check_health(run: Run) -> None:
    """UserError, the same on every rank, when a bad update was found and the run must not go on or be saved."""
    found, train = run.engine.guard.read(), run.config.train
    with common_to_all_ranks():
        if found.num_bad and train.bad_step == "stop":
            raise UserError(
                f"{found}; the update was not made; lower optim.lr={run.config.optim.lr} or take train.bad_step skip, "
                "and start again from the last checkpoint"
            )
        if found.in_a_row >= LONGEST_ROW:
            raise UserError(
                f"{found}, the last of {found.in_a_row} bad updates in a row; lower optim.lr={run.config.optim.lr} and "
                "start again from the last checkpoint"
            )


def _by_teacher(teachers: Sequence[TeacherFacts], found: Figures) -> dict[str, dict[str, float]]:
    """Of teachers with rows of their own, what each said about those that it taught since the last line."""
    told = zip(teachers, found.teachers, found.teacher_tokens, strict=True)
    return {
        facts.name: {**means, "tokens": tokens}
        for facts, means, tokens in told
        if facts.name is not None and facts.domains is not None and means["rows"]
    }


def _validate(run: Run, log: MetricsLog, display: Display, watchdog: Watchdog) -> None:
    """Measure every domain; the figures of the run, and its best weights, are those of the domains it trains on."""

    def evaluate(batch: Batch) -> LossOutput:
        watchdog.at(run.totals.step, "validation")
        return run.engine.evaluate(batch)

    by_domain = {domain: validate(batches, evaluate, device=run.device) for domain, batches in run.valid.items()}
    result = Perplexity.together(by_domain[domain] for domain in measured_domains(run.data))
    domains = {domain: found.figures for domain, found in by_domain.items()} if len(by_domain) > 1 else {}
    log.write("valid", run.totals, **result.figures, **({"domains": domains} if domains else {}))
    measured = {"valid": result.figures} | {f"valid/{domain}": figures for domain, figures in domains.items()}
    values = [(f"{name}/{key}", figures[key]) for name, figures in measured.items() for key in ("ce", "ppl")]
    run.engine.write_monitor([(name, value, run.totals.samples) for name, value in values])
    display.validation(run.totals.step, result.ppl, {domain: found.ppl for domain, found in by_domain.items()})
    if result.ce < run.best_ce:
        run.best_ce = result.ce
        write = _export(run, result=result)
        checkpoint.replace_folder(run.run_dir / "best", lambda folder: write(folder) if write else None)


def _export(run: Run, snapshot: Snapshot = as_it_is, result: Perplexity | None = None) -> Callable[[Path], None] | None:
    """What writes the student as it is now as a Hugging Face folder with its tokenizer; None on ranks above 0.

    Called by all ranks. The writer looks at nothing that training changes, if `snapshot` copies the weights.
    """
    state = run.engine.state_dict()
    exported = run.exported
    if exported is None:
        return None
    state = snapshot(state)
    totals, manifest = run.totals, copy.deepcopy(run.manifest)
    describe = functools.partial(
        lineage.describe,
        manifest | {"student": exported.parameters},
        step=totals.step,
        tokens=totals.tokens,
        flops=(totals.student_flops, totals.teacher_flops),
        ppl=result.ppl if result is not None else None,
    )
    facts: dict[str, Any] = {"step": totals.step, "tokens": totals.tokens}
    facts |= {"validation perplexity": f"{result.ppl:.2f}"} if result is not None else {}
    measured = {"step": totals.step, **asdict(result), "ppl": result.ppl} if result is not None else None

    def write(folder: Path) -> None:
        what = f"run {manifest['name']} at step {facts['step']:,}"
        exported.write(folder, state, describe, what=what, run_dir=run.run_dir, manifest=manifest, facts=facts)
        if measured is not None:
            write_json(folder / "valid.json", measured)

    return write


def _saver(run: Run, watchdog: Watchdog) -> Saver:
    train = run.config.train
    return Saver(
        run.run_dir / "checkpoints",
        keep=train.keep_checkpoints,
        keep_every=train.keep_every,
        in_background=train.save_in_background,
        device=run.device,
        about_to_wait=lambda: watchdog.at(run.totals.step, "saving", watched=False),
    )


def _save(run: Run, saver: Saver, *, at_once: bool) -> None:
    """Save this step, or begin to, if its weights are fit for it; what ends the run is saved at once."""
    _check_health(run)
    if not run.engine.weights_are_finite():
        with common_to_all_ranks():
            raise UserError(
                f"a weight is NaN or Inf at step {run.totals.step}, nothing was saved; lower optim.lr="
                f"{run.config.optim.lr} and start again from the last checkpoint"
            )
    state: dict[str, Any] = {"totals": asdict(run.totals), "window": run.window.state(), "best_ce": run.best_ce}
    if run.handover is not None:
        state["handover"] = run.handover.saved()
    saver.save(run.totals.step, run.engine, state, lambda snapshot: _export(run, snapshot), at_once=at_once)


def _stop(run: Run, preemption: Preemption) -> None:
    """Raise ResumableError on every rank."""
    with common_to_all_ranks():
        raise ResumableError(
            f"stopped by {preemption.reasons()} at step {run.totals.step} of {run.config.train.num_steps}, saved in "
            f"{run.run_dir}; start it again to go on"
        )


def _finish(run: Run, last: int) -> None:
    run.record()
    what = "finished" if run.is_finished else f"stopped at step {last} as asked; call it again to go on"
    say(f"{run.run_dir}: {what}; best valid ppl {math.exp(run.best_ce):.2f}")
