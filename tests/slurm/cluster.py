"""Slurm on this machine alone: a controller and two nodes, on loopback, with a munge of its own.

Both nodes are this host under two names, each with two CPUs whatever it really has. Nothing of the machine's own Slurm
is read or written; what is started here is ended by its process id. A job that is queued again waits for as long as a
credential holds, here for five seconds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from ki_ds.ranks.world import free_port
from tests.tiny import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scancel", "scontrol", "squeue", "sinfo")
NODES = ("alpha", "beta")
_SEARCHED = os.environ["PATH"] + ":/usr/sbin:/sbin"
_CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_setup_env_fail
KillWait=60
NodeName=alpha NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2
NodeName=beta NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str | None:
    """Why Slurm cannot be started, in a word or two; None where it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}; apt-get install slurm-wlm munge"
    return "not root, who alone may start tasks" if os.geteuid() != 0 else None


class Cluster:
    """The daemons, started; a context at whose end none of them is left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))
        ports = [free_port() for _ in range(3)]
        text = _CONFIG.format(
            host=socket.gethostname().split(".")[0], folder=self.folder, port=ports[0], ports=ports[1:]
        )
        (self.folder / "slurm.conf").write_text(text)
        options = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options["seed-file"] = "munge.seed"
        try:
            self._start("munged", "--foreground", *(f"--{name}={self.folder / file}" for name, file in options.items()))
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")
            self._start("slurmctld", "-D", "-c")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            self._until(lambda: self.run(["sinfo", "-h", "-o", "%D %t"]).stdout == "2 idle\n", "no idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:  # jobs of a test that failed
            self.run(["scancel", "--user=root", "--signal=KILL", "--full"])
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}_{len(self._daemons)}.out").open("w") as said:
            command = [str(shutil.which(program, path=_SEARCHED)), *arguments]
            self._daemons.append(subprocess.Popen(command, env=self.environment(), stdout=said, stderr=said))

    def _until(self, ready, otherwise: str, *, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < until, otherwise
            time.sleep(0.2)

    def environment(self, **extra: str) -> dict[str, str]:
        """The environment of a user of this cluster, with no number of threads in it."""
        kept = {
            name: value for name, value in environment().items() if not name.startswith(("SLURM_", "OMP_", "KI_DS_"))
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), **extra}

    def run(self, command: list, *, timeout: float = 240, **extra: str) -> subprocess.CompletedProcess:
        """Run a command of a user to its end."""
        words = [str(word) for word in command]
        return subprocess.run(words, env=self.environment(**extra), capture_output=True, text=True, timeout=timeout)

    def states(self) -> str:
        """What is queued: a line with number, state and reason for each job."""
        return self.run(["squeue", "-h", "-o", "%i %T %r"]).stdout

    def wait_until_idle(self, *, seconds: float = 240) -> None:
        """Return once no job is left."""
        self._until(lambda: not self.states(), "a job did not end", seconds=seconds)
