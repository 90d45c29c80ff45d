"""One job on this host, started again from its last checkpoint when it ends before its last step.

DeepSpeed's launcher leaves ranks behind when it is killed, and its runner returns 0 then. So the job gets a process
group of its own, of which nothing is left when it has ended, and only its run folder says whether it is done.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from ki_ds import config as configuration
from ki_ds.errors import EXIT_USER_ERROR, ResumableError, UserError
from ki_ds.files import read_json

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "train_ki.sh"
_GRACE_SECONDS = 30.0  # for ranks to save and leave, as DeepSpeed's launcher gives them
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# --- how far a run is ---------------------------------------------------------------------------------------------


def is_finished(run_dir: Path) -> bool:
    """Whether the folder holds a run that came to its last step."""
    path = run_dir / "run.json"
    return path.exists() and read_json(path)["status"] == "finished"


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    names = [path.name for path in (run_dir / "checkpoints").glob("step_*") if path.is_dir()]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


# --- a job --------------------------------------------------------------------------------------------------------


def supervise(
    name: str, start: Callable[[], tuple[int, str | None]], is_done: Callable[[], bool], *, restarts: int
) -> None:
    """Start a job until it is done, again at most `restarts` times.

    Args:
        start: runs the job to its end; its exit code, and the signal that asked this process to stop it.

    Raises:
        UserError: a rank refused to go on (its line says why), which a restart would not change.
        ResumableError: it was stopped by a signal, or has failed too often.
    """
    for number in range(restarts + 1):
        code, stopped_by = start()
        if is_done():
            return
        if stopped_by is not None:
            raise ResumableError(f"{name} was stopped by {stopped_by}; call it again to go on")
        how = f"{name} stopped with exit code {code} before its last step"
        if code == EXIT_USER_ERROR:
            raise UserError(f"{how}; its own line says why")
        if number == restarts:
            after = f" after {restarts} restarts" if restarts else ""
            raise ResumableError(f"{how}{after}; call it again to go on")
        print(f"{how}; restart {number + 1} of {restarts} from its last checkpoint", flush=True)


def run_group(command: list[str], environment: dict[str, str]) -> tuple[int, str | None]:
    """Run a launcher in a process group of its own, of which nothing is left afterwards, however it ends.

    A signal to this process asks the ranks to save and leave, and is waited for; a second one ends them.

    Returns:
        The command's exit code, and the name of the signal that this process got.
    """
    # a rank's variables, where this process has trained itself, are not the launcher's
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "LOCAL_RANK")}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[str] = []

    def handle(number: int, _frame: object) -> None:
        received.append(signal.Signals(number).name)
        if len(received) > 1 or not _ask_to_leave(process):
            _send(process.pid, signal.SIGTERM)

    try:
        with signals_handled(handle):
            while process.poll() is None and len(received) < 2:
                time.sleep(0.05)
    finally:
        _end_group(process)
    return process.wait(), received[0] if received else None


@contextlib.contextmanager
def signals_handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    """Let `handle` have this process's SIGTERM, SIGINT and SIGUSR1 while the context lasts."""
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_leave(launcher: subprocess.Popen) -> bool:
    """Ask the ranks below a launcher, not the launcher itself: it would kill them after half a minute."""
    asked = False
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                parent = child.parent()
                if "RANK" in child.environ() and parent is not None and "RANK" not in parent.environ():
                    child.send_signal(signal.SIGUSR1)
                    asked = True
    return asked


def _send(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _end_group(process: subprocess.Popen) -> None:
    """End what is left of the process's group: what saves on SIGTERM has the time for it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not _members(process):
            return
        _send(process.pid, number)
        until = time.monotonic() + _GRACE_SECONDS
        while _members(process) and time.monotonic() < until:
            time.sleep(0.1)


def _members(process: subprocess.Popen) -> list[int]:
    """The processes of its group that still run."""
    process.poll()
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(each.pid) == process.pid and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.pid)
    return found


# --- the command line ---------------------------------------------------------------------------------------------


def deepspeed_command(env: Mapping[str, str]) -> list[str]:
    """`deepspeed` with the options that the user gave, as launchers/train_ki.sh calls it; the last one counts."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    given = (("--master_addr", env.get("MASTER_ADDR")), ("--master_port", env.get("MASTER_PORT")))
    options = [word for name, value in given if value for word in (name, value)]
    options += shlex.split(env.get("KI_DS_ARGS", ""))
    return [str(deepspeed) if deepspeed.exists() else "deepspeed", *options]


def run_supervised(argv: list[str], *, max_restarts: int) -> None:
    """Train what the command line describes as `bash launchers/train_ki.sh` does, and start it again when it fails.

    Raises:
        UserError, ResumableError: as `supervise`.
    """
    config = configuration.parse(argv)
    run_dir = Path(config.run_dir)
    last = min(config.train.stop_at_step or config.train.num_steps, config.train.num_steps)
    command = [*deepspeed_command(os.environ), str(LAUNCHER), *argv]
    environment = {name: value for name, value in os.environ.items() if name != "KI_DS_ARGS"}
    supervise(
        str(run_dir),
        lambda: run_group(command, environment),
        lambda: is_finished(run_dir) or saved_step(run_dir) >= last,
        restarts=max_restarts,
    )
