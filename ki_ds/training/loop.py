"""The loop: batch, teacher's signal, student's loss, backward, step, metrics."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable
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
from ki_ds.data.batches import Batch, with_next
from ki_ds.engine.guard import LONGEST_ROW
from ki_ds.engine.student import connect
from ki_ds.errors import ResumableError, UserError, common_to_all_ranks
from ki_ds.evaluation.perplexity import Perplexity, validate
from ki_ds.files import write_json
from ki_ds.objective.types import LossOutput
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.stragglers import Pace
from ki_ds.ranks.watchdog import Watchdog
from ki_ds.ranks.world import is_main, on_main, rank, say, world_size
from ki_ds.reports.metrics import Display, MetricsLog, Stopwatch
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
    run_dir = Path(config.run_dir)
    with watchdog, watchdog.naming_lost_ranks(), contextlib.ExitStack() as stack:
        if bridge is not None and bridge.is_teacher:
            watchdog.at(0, "teaching", watched=False)
            with preemption.handled():  # its students learn of it and stop; then it leaves too
                teach(config, bridge, device)
            return
        stack.enter_context(checkpoint.naming_a_full_disk(run_dir))
        on_main(lambda: stack.enter_context(checkpoint.claimed(run_dir)))
        with common_to_all_ranks():
            run = prepare(config, device, bridge)
        step, stop = run.totals.step, config.train.stop_at_step
        if run.is_finished:
            say(f"{run_dir} is finished: step {step}, best valid ppl {math.exp(run.best_ce):.2f}")
            return
        if stop is not None and step >= stop:
            say(f"{run_dir} is at step {step} already, train.stop_at_step={stop}: nothing was done; raise it to go on")
            return
        if started is not None:
            say(f"first step after {time.monotonic() - started:.1f} s")
        with preemption.handled():
            Loop(run, preemption, watchdog).go()
        run.engine.close()


class Loop:
    """Takes a run's steps, and does what is due after each: a line of metrics, a validation, a checkpoint."""

    def __init__(self, run: Run, preemption: Preemption, watchdog: Watchdog):
        self.run, self.preemption, self.watchdog = run, preemption, watchdog
        config, totals = run.config, run.totals
        self.last = min(config.train.stop_at_step or config.train.num_steps, config.train.num_steps)
        self.log = MetricsLog(run.run_dir / "metrics.jsonl", resume_step=totals.step)
        on_main(lambda: run.engine.open_monitors(config.monitor, run.run_dir / "monitor", samples=totals.samples))
        self.display = Display(
            config.monitor.progress, title=run.run_dir.name, num_steps=config.train.num_steps, start_step=totals.step
        )
        self.watch = Stopwatch(totals.seconds)
        self.pace = Pace(run.device)
        self.saver = Saver(
            run.run_dir / "checkpoints",
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
            in_background=config.train.save_in_background,
            device=run.device,
            about_to_wait=lambda: watchdog.at(totals.step, "saving", watched=False),
        )

    def go(self) -> None:
        """Take all steps. Called by every rank."""
        run, monitor = self.run, self.run.config.monitor
        say(f"loss backend: {run.manifest['loss_backend']}")
        with (
            contextlib.closing(self.display),
            self.saver,
            profiled_steps(monitor.profile_steps if is_main() else 0, run.run_dir / "profile") as count_step,
        ):
            if run.totals.step == 0:
                self._validate()
            self._go_on()
            batches = with_next(run.batches(self.last))
            for micro_batches, upcoming in self.pace.loading(each("data", batches)):
                if run.teacher is not None and run.totals.step >= run.taught.stop:
                    self._free_teacher()
                rates = train_step(run, micro_batches, self.preemption, self.pace, upcoming=upcoming)
                run.totals.step += 1
                run.totals.samples += run.config.train.global_batch_size
                count_step()
                self.display.advance(run.totals.step)
                self._after_step(rates)
        run.record()
        what = "finished" if run.is_finished else f"stopped at step {self.last} as asked; call it again to go on"
        say(f"{run.run_dir}: {what}; best valid ppl {math.exp(run.best_ce):.2f}")

    def _go_on(self) -> None:
        self.watch.run()
        self.watchdog.at(self.run.totals.step + 1, "training")

    def _after_step(self, rates: dict[str, float | Tensor]) -> None:
        """Do what is due. Raises ResumableError on every rank, the step saved, when a signal asked the run to stop."""
        run, train, step = self.run, self.run.config.train, self.run.totals.step
        stopping = self.preemption.agreed() and step < self.last
        at_end = stopping or step == self.last
        if at_end or step % train.log_every == 0 or step % train.eval_every == 0:
            self._report(rates)
        if (at_end and not stopping) or step % train.eval_every == 0:
            self._validate()
        if at_end or step % train.save_every == 0:
            self.save(at_once=at_end)
        if stopping:
            with common_to_all_ranks():
                raise ResumableError(
                    f"stopped by {self.preemption.reasons()} at step {step} of {train.num_steps}, saved in "
                    f"{run.run_dir}; start it again to go on"
                )
        self._go_on()

    def _settle(self) -> None:
        """Bring the totals up to this step, and stop the watch. Called by all ranks; waits for the device."""
        run, totals = self.run, self.run.totals
        totals.seconds = self.watch.pause()
        tokens, teacher_tokens = run.window.settle()
        totals.tokens += tokens
        totals.student_flops = 6.0 * run.manifest["student"]["dense_parameters"] * totals.tokens
        for facts, asked in zip(run.facts, teacher_tokens, strict=True):
            totals.teacher_flops += 2.0 * facts.dense_parameters * asked
        run.notice_hand_over()

    def _free_teacher(self) -> None:
        run, before = self.run, _memory_bytes()
        assert run.teacher is not None
        self._settle()
        run.teacher.free()
        run.teacher = None
        self.log.write("teacher_freed", run.totals, bytes_before=before, bytes_after=_memory_bytes())
        self.watch.run()

    def _report(self, rates: dict[str, float | Tensor]) -> None:
        """Write a line of metrics, begin the next window, and see how saves, weights and ranks are doing."""
        self._settle()
        run, totals, engine = self.run, self.run.totals, self.run.engine
        window, run.window = run.window.figures(totals.seconds), run.new_window()
        figures = window.means | {name: float(rate) for name, rate in rates.items()} | window.others
        figures |= run.teacher.figures() if run.teacher is not None else {}
        if (norm := engine.grad_norm) is not None:
            figures["grad_norm"] = norm
        by_teacher = {
            facts.name: told
            for facts, told in zip(run.facts, window.teachers, strict=True)
            if facts.name is not None and facts.domains is not None and told["rows"]
        }
        counts = {"skipped_steps": engine.skipped_steps, "bad_steps": engine.guard.read().num_bad}
        self.log.write("train", totals, **figures, **counts, **({"teachers": by_teacher} if by_teacher else {}))
        events = figures | {f"{name}/{key}": value for name, told in by_teacher.items() for key, value in told.items()}
        engine.write_monitor([(f"train/{name}", value, totals.samples) for name, value in events.items()])
        self.display.figures(totals.step, figures)
        _check_health(run)
        self.saver.look()
        if line := self.pace.report(totals.step):
            say(line)
            self.log.write("straggler", totals, line=line)

    def _validate(self) -> None:
        """Measure every domain; the figures of the run, and its best weights, are those of the domains it trains on."""
        run, totals = self.run, self.run.totals

        def evaluate(batch: Batch) -> LossOutput:
            self.watchdog.at(totals.step, "validation")
            return run.engine.evaluate(batch)

        by_domain = {domain: validate(batches, evaluate, device=run.device) for domain, batches in run.valid.items()}
        result = Perplexity.together(by_domain[domain] for domain in measured_domains(run.data))
        domains = {domain: own.figures for domain, own in by_domain.items()} if len(by_domain) > 1 else {}
        self.log.write("valid", totals, **result.figures, **({"domains": domains} if domains else {}))
        measured = {"valid": result.figures} | {f"valid/{domain}": figures for domain, figures in domains.items()}
        values = [(f"{name}/{key}", figures[key]) for name, figures in measured.items() for key in ("ce", "ppl")]
        run.engine.write_monitor([(name, value, totals.samples) for name, value in values])
        self.display.validation(totals.step, result.ppl, {domain: own.ppl for domain, own in by_domain.items()})
        if result.ce < run.best_ce:
            run.best_ce = result.ce
            write = _export(run, result=result)
            checkpoint.replace_folder(run.run_dir / "best", lambda folder: write(folder) if write else None)

    def save(self, *, at_once: bool) -> None:
        """Save this step, or begin to, if its weights are fit for it; what ends the run is saved at once."""
        self._settle()
        run, step = self.run, self.run.totals.step
        self.watchdog.at(step, "saving", watched=False)
        _check_health(run)
        if not run.engine.weights_are_finite():
            with common_to_all_ranks():
                raise UserError(
                    f"a weight is NaN or Inf at step {step}, nothing was saved; lower optim.lr="
                    f"{run.config.optim.lr} and start again from the last checkpoint"
                )
        self.saver.save(step, run.engine, run.state(), lambda snapshot: _export(run, snapshot), at_once=at_once)


def train_step(
    run: Run,
    micro_batches: list[Batch],
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
    teacher = run.teacher if t in run.taught else None
    lr = schedules.learning_rate(
        t, peak=config.optim.lr, num_steps=config.train.num_steps, warmup_fraction=config.optim.warmup_fraction
    )
    rows = preemption.global_rows(sum(batch.num_rows for batch in micro_batches), run.device)
    following = upcoming[0] if upcoming and t + 1 in run.taught else None
    for micro_step, (batch, next_batch) in enumerate(zip(micro_batches, [*micro_batches[1:], following], strict=True)):
        # dropout is a function of (seed, step, micro step, rank), so that a resumed run drops the same
        words = np.random.SeedSequence((config.seed, t, micro_step, rank())).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]) >> 1)
        with part("teacher"), pace.computing(alone=config.teacher.placement != "ranks"):
            batch = batch.to(run.device, non_blocking=True)
            signal = teacher.signal(batch) if teacher is not None else None
        if run.teacher is not None and next_batch is not None:
            run.teacher.ask(next_batch)
        with part("student forward"), pace.computing(alone=run.engine.zero_stage < 3):
            out, aux_loss = run.engine.loss(batch, signal, alpha)
        with part("backward"):
            run.engine.backward(out.loss_sum, rows, aux_loss)
        with part("optimizer"):
            run.engine.step(lr)
        run.window.add(out, batch.num_tokens, teacher_tokens=teacher_tokens(signal, batch), aux_loss=aux_loss)
        if run.handover is not None:
            run.handover.add(out.teachers)
    if run.handover is not None and t in run.taught:
        run.handover.settle()
    return {"alpha": alpha, "lr": lr}


def _memory_bytes() -> int:
    """Bytes that this rank holds: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _check_health(run: Run) -> None:
    """UserError, the same on every rank, when a bad update was found and the run must not go on or be saved."""
    found, lr = run.engine.guard.read(), run.config.optim.lr
    with common_to_all_ranks():
        if found.num_bad and run.config.train.bad_step == "stop":
            raise UserError(
                f"{found}; the update was not made; lower optim.lr={lr} or take train.bad_step skip, "
                "and start again from the last checkpoint"
            )
        if found.in_a_row >= LONGEST_ROW:
            raise UserError(
                f"{found}, the last of {found.in_a_row} bad updates in a row; lower optim.lr={lr} and "
                "start again from the last checkpoint"
            )


def _export(run: Run, snapshot: Snapshot = as_it_is, result: Perplexity | None = None) -> Callable[[Path], None] | None:
    """What writes the student as it is now as a Hugging Face folder with its tokenizer; None on ranks above 0.

    Called by all ranks. The writer looks at nothing that training changes, if `snapshot` copies the weights.
    """
    state, exported = run.engine.state_dict(), run.exported
    if exported is None:
        return None
    state = snapshot(state)
    totals, manifest = copy.copy(run.totals), copy.deepcopy(run.manifest)
    describe = functools.partial(
        lineage.describe,
        manifest | {"student": exported.parameters},
        step=totals.step,
        tokens=totals.tokens,
        flops=(totals.student_flops, totals.teacher_flops),
        ppl=result.ppl if result is not None else None,
    )
    facts: dict[str, Any] = {"step": totals.step, "tokens": totals.tokens}
    if result is not None:
        facts["validation perplexity"] = f"{result.ppl:.2f}"

    def write(folder: Path) -> None:
        what = f"run {manifest['name']} at step {totals.step:,}"
        exported.write(folder, state, describe, what=what, run_dir=run.run_dir, manifest=manifest, facts=facts)
        if result is not None:
            write_json(folder / "valid.json", {"step": totals.step, **asdict(result), "ppl": result.ppl})

    return write
