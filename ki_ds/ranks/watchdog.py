"""Ranks that look after one another: who dies, stops or hangs is named, and the whole job ends.

Every rank's thread leaves a heartbeat in the store on the launcher's port: how far it has come, and, when it stands
still, where. Rank 0 looks at all of them and leaves a verdict, which the others read; they look at rank 0. A rank that
is gone or silent ends the job, and so do students of which none has come further for `timeout_seconds`; the line names
those that are to blame: silent ones, else those furthest behind that wait for nobody.

The same heartbeats carry a wish to stop to the ranks in no common world (a teacher's), and each rank looks at its
launcher: when that is gone, the run is saved and left, for nobody would end it any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch.distributed as dist

from ki_ds.errors import EXIT_RESUMABLE, ResumableError
from ki_ds.ranks.preemption import Preemption
from ki_ds.ranks.world import store_client

_PULSE_SECONDS = 1.0
_LOST_SECONDS = 6.0  # of silence that are enough once a connection broke
_WAITS_IN = ("torch/distributed/", "deepspeed/comm/", "torch/cuda/streams.py", "ki_ds/ranks/bridge.py")
_LAUNCHERS = ("deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
_AGAIN = "start it again to go on from the last checkpoint"


# --- one rank's view ----------------------------------------------------------------------------------------------


def whereabouts(thread_id: int) -> tuple[str, bool]:
    """("function (file:line)" that a thread is in, whether it waits for another rank or the device)."""
    frame: FrameType | None = sys._current_frames().get(thread_id)
    if frame is None:
        return "an unknown place", False
    innermost = frame
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _WAITS_IN):
            return frame.f_code.co_name, True
        frame = frame.f_back
    code = innermost.f_code
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{innermost.f_lineno})", False


class Launcher:
    """DeepSpeed's or torchrun's process that has started this rank and would end it, and the one that started that.

    Anything else may end as it likes: a shell, say, that has left its job to run on.
    """

    def __init__(self) -> None:
        self._chain: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process().parent()
            if parent is None or not any(word in " ".join(parent.cmdline()) for word in _LAUNCHERS):
                return
            self._chain = [parent]
            above = parent.parent()
            if above is not None and above.pid != 1:
                self._chain.append(above)

    def is_gone(self) -> bool:
        """Whether one of them has ended."""
        return not all(is_alive(process) for process in self._chain)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs, under this number and not as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass
class Rank:
    """What rank 0 knows of a rank. Times are rank 0's own."""

    beat: dict[str, Any]
    heard: float
    moved: float

    def hear(self, beat: dict[str, Any], now: float) -> None:
        """Take in a heartbeat, which may be an old one."""
        if beat["number"] != self.beat["number"]:
            self.heard = now
        if beat["progress"] != self.beat["progress"]:
            self.moved = now
        self.beat = beat


def name(number: int, beat: Mapping[str, Any]) -> str:
    """How a line speaks of a rank."""
    kind = "teacher rank" if beat["teaches"] else "rank"
    return f"{kind} {number} (host {beat['host']}, pid {beat['pid']})"


def own_machine() -> str:
    """What tells this host's processes from those of any other, which may have the same name."""
    told = [socket.gethostname()]
    with contextlib.suppress(OSError):
        told += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(told)


def verdict(ranks: Mapping[int, Rank], now: float, *, timeout: float, machine: str) -> tuple[str, list[int]] | None:
    """The line that ends the job and the ranks that are to blame; None while all is well.

    Pure but for a look at the processes of this host.
    """
    active = {number: rank for number, rank in ranks.items() if not rank.beat["left"]}
    broken = any(rank.beat["broken"] for rank in active.values())
    patience = min(timeout, _LOST_SECONDS) if broken else timeout
    for number, rank in active.items():
        said = f"{name(number, rank.beat)}, last seen at step {rank.beat['step']} in {rank.beat['phase']},"
        if rank.beat["machine"] == machine and not _runs(rank.beat):
            return f"{said} is gone; {_AGAIN}", [number]
        if now - rank.heard > patience:
            return f"{said} has given no sign of life for {now - rank.heard:.0f} s; {_AGAIN}", [number]
    students = {number: rank for number, rank in active.items() if not rank.beat["teaches"]}
    if not students or not all(r.beat["watched"] and now - r.moved > timeout for r in students.values()):
        return None
    behind = min(rank.beat["step"] for rank in students.values())
    last = {number: rank for number, rank in students.items() if rank.beat["step"] == behind}
    teachers = {number: rank for number, rank in active.items() if rank.beat["teaches"]}
    idle = {number: rank for number, rank in {**last, **teachers}.items() if not rank.beat["waits"]} or last
    who = ", ".join(f"{name(n, r.beat)} in {r.beat['phase']}, {r.beat['where']}" for n, r in sorted(idle.items()))
    stands = now - max(rank.moved for rank in students.values())
    waiting = sorted({r.beat["where"] for n, r in active.items() if n not in idle})
    others = f"; the others wait in {', '.join(waiting)}" if waiting else ""
    return f"no progress for {stands:.0f} s since step {behind}: {who}{others}; {_AGAIN}", sorted(idle)


# --- the threads ----------------------------------------------------------------------------------------------------


@dataclass
class Watchdog:
    """Watches over a job's ranks from every one of them; a context.

    Args:
        rank: in the job, teacher ranks behind the students.
        num_ranks: of the job.
        teaches: whether this is a teacher's rank.
        timeout_seconds: how long a rank may be silent or the students without progress; 0 looks at neither.
    """

    rank: int
    num_ranks: int
    preemption: Preemption
    timeout_seconds: float
    teaches: bool = False
    _beat: dict[str, Any] = field(default_factory=dict)
    _verdict: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Watchdog:
        own = psutil.Process()
        self._main = threading.get_ident()
        self._beat = {
            "number": 0,
            "progress": 0,
            "step": 0,
            "phase": "preparation",
            "watched": False,
            "broken": False,
            "left": False,
            "waits": False,
            "where": "",
            "signal": None,
            "teaches": self.teaches,
            "host": socket.gethostname(),
            "machine": own_machine(),
            "pid": own.pid,
            "born": own.create_time(),
        }
        self._closed = threading.Event()
        self._began = time.monotonic()
        self._exchanged, self._first = self._began, {"host": "unknown", "machine": "", "pid": 0, "teaches": False}
        self._ranks: dict[int, Rank] = {}
        self._threads = [threading.Thread(target=self._look, daemon=True)]
        if self.num_ranks > 1 and self.timeout_seconds:
            self._threads.append(threading.Thread(target=self._pulse, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say that this rank has left in order, so that nobody misses it."""
        self._beat["left"] = True
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2 * _PULSE_SECONDS)

    def at(self, step: int, phase: str, *, watched: bool = True) -> None:
        """Note that this rank has come to a phase of a step (from 1); unless `watched`, it may take any time."""
        self._beat["step"], self._beat["phase"], self._beat["watched"] = step, phase, watched
        self._beat["progress"] += 1

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """A broken connection in the context becomes a ResumableError that names the rank that was lost."""
        try:
            yield
        except RuntimeError as error:
            words = str(error).lower()
            if len(self._threads) < 2 or not any(w in words for w in ("gloo", "nccl", "connection", "socket", "peer")):
                raise
            self._beat["broken"] = True
            until = time.monotonic() + 2 * _LOST_SECONDS
            while not self._verdict.get("line") and not self._first.get("left") and time.monotonic() < until:
                time.sleep(0.1)
            if self._verdict.get("somebody_left") or self._first.get("left"):  # with a line of its own
                line = ResumableError(f"another rank has left; {_AGAIN}")
                line.said_by_main = True
                raise line from None
            if not self._verdict.get("line"):
                raise
            line = ResumableError(self._verdict["line"])
            line.said_by_main = self._verdict["by"] != self.rank
            raise line from None

    # --- its own process

    def _look(self) -> None:
        """Look at the launcher, and at whether rank 0 still answers."""
        launcher, looked = Launcher(), time.monotonic()
        while not self._closed.wait(_PULSE_SECONDS):
            now = time.monotonic()
            if now - looked > 5 * _PULSE_SECONDS:  # this process was stopped itself
                self._exchanged = now
            looked = now
            if launcher.is_gone():
                self.preemption.request("the end of its launcher")
            silent = now - self._exchanged
            broken = len(self._threads) > 1 and self._beat["broken"] and silent > _LOST_SECONDS
            if len(self._threads) > 1 and (silent > self.timeout_seconds or broken):
                line = f"{name(0, self._first)} has not answered for {silent:.0f} s; {_AGAIN}"
                self._end({"line": line, "by": min(1, self.num_ranks - 1), "kill": [self._first]})

    # --- the others

    def _pulse(self) -> None:
        """Leave heartbeats and read the verdict; on rank 0, give it."""
        try:
            store = store_client("watchdog")
            while True:
                closed = self._closed.wait(_PULSE_SECONDS)
                self._exchange(store)
                if closed:
                    return
        except RuntimeError:  # DistError: the store is gone with rank 0, or with torchrun
            if not self._closed.wait(2 * _PULSE_SECONDS) and not self._first.get("left"):
                self._end({"line": f"{name(0, self._first)} is gone; {_AGAIN}", "by": 1, "kill": []})

    def _exchange(self, store: dist.Store) -> None:
        where, waits = whereabouts(self._main)
        self._beat |= {"number": self._beat["number"] + 1, "where": where, "waits": waits}
        self._beat["signal"] = self.preemption.reason
        store.set(f"beat_{self.rank}", json.dumps(self._beat))
        if self.rank == 0:
            store.set("verdict", json.dumps(self._judged(store)))
        if store.check(["verdict"]):
            found = json.loads(store.get("verdict"))
            self._first = found["first"]
            if found["number"] != self._verdict.get("number"):
                self._exchanged = time.monotonic()
            self._verdict = found
            if found["signal"] and not self._closed.is_set():
                self.preemption.request(found["signal"])
            if found["line"]:
                self._end(found)

    def _judged(self, store: dist.Store) -> dict[str, Any]:
        """What rank 0 says about all."""
        now = time.monotonic()
        if now - self._exchanged > 5 * _PULSE_SECONDS:  # it was stopped itself: begin to count anew
            self._ranks.clear()
            self._began = now
        keys = {number: f"beat_{number}" for number in range(self.num_ranks)}
        there = [number for number, key in keys.items() if number in self._ranks or store.check([key])]
        for number, text in zip(there, store.multi_get([keys[number] for number in there]), strict=True):
            beat = json.loads(text)
            self._ranks.setdefault(number, Rank(beat, now, now)).hear(beat, now)
        signals = [r.beat["signal"] for r in self._ranks.values() if r.beat["signal"]]
        found = verdict(self._ranks, now, timeout=self.timeout_seconds, machine=self._beat["machine"])
        line, blamed = found or (None, [])
        never = [number for number in keys if number not in self._ranks]
        if line is None and never and now - self._began > self.timeout_seconds:
            line = f"rank {never[0]} has given no sign of life since it came; {_AGAIN}"
        return {
            "number": self._beat["number"],
            "first": self._beat,
            "signal": signals[0] if signals else None,
            "somebody_left": any(r.beat["left"] and not r.beat["teaches"] for r in self._ranks.values()),
            "line": self._verdict.get("line") or line,
            "by": 0,
            "kill": [self._ranks[number].beat for number in blamed],
        }

    def _end(self, found: dict[str, Any]) -> None:
        """End this process, and what cannot end itself on this host, with one line from one rank."""
        self._verdict = found
        if self._beat["left"]:
            return
        if found["by"] == self.rank:
            if not self._beat["broken"]:  # else the main thread says it
                print(f"error: {found['line']}", file=sys.stderr, flush=True)
            time.sleep(3 * _PULSE_SECONDS)  # the others read the verdict from here
        else:
            time.sleep(1.5 * _PULSE_SECONDS)
        for beat in found["kill"]:
            _kill(beat)
        os._exit(EXIT_RESUMABLE)


def _runs(beat: Mapping[str, Any]) -> bool:
    """Whether the process that left this heartbeat, on this host, is still there."""
    try:
        process = psutil.Process(beat["pid"])
        return process.create_time() == beat["born"] and is_alive(process)
    except psutil.Error:
        return False


def _kill(beat: Mapping[str, Any]) -> None:
    """Kill a rank of this job on this host that hangs; never another process that got its number."""
    with contextlib.suppress(psutil.Error):
        if beat["machine"] == own_machine() and beat["pid"] != os.getpid() and _runs(beat):
            psutil.Process(beat["pid"]).send_signal(signal.SIGKILL)
