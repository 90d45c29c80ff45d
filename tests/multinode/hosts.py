"""Two hosts and a switch between them on one machine, for jobs that are started over ssh.

Each is a set of namespaces: a network, process numbers, a host name, and mounts (its /etc/hosts, /run and ssh
configuration) of its own; the file system is shared. All traffic stays between them. A host lives as long as its
first process, which ends when this process closes a pipe or is gone, and the kernel ends all others of the host then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

NAMES = ("nodea", "nodeb")
ADDRESSES = ("10.199.77.1", "10.199.77.2")
INTERFACE = "trunk0"
PROGRAMS = ("unshare", "nsenter", "ip", "mount", "ssh", "sshd", "ssh-keygen", "pdsh", "pkill")
_SWITCH = "switch"
_NAMESPACES = ["--net", "--pid", "--uts", "--mount"]
_SEARCHED = os.environ["PATH"] + ":/usr/sbin:/sbin"

_INIT = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts_{name} /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
hostname {name}
ip link set lo up
/usr/sbin/sshd -f {folder}/sshd_config -E {folder}/{name}.log
echo up
read -r _ || true   # until the pipe is closed
"""
_SSHD_CONFIG = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100
PidFile none
"""
_SSH_CONFIG = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def what_is_missing() -> str | None:
    """Why there can be no hosts here, in a word or two; None where there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}; apt-get install iproute2 openssh-server openssh-client pdsh procps"
    if os.geteuid() != 0:
        return "not root, who alone may make network namespaces"
    devices = "ip link add trunka type veth peer name trunkb && ip link add switch type bridge"
    probe = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "sh", "-c", f"mount -t proc proc /proc && hostname x && {devices}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": _SEARCHED},
    )
    return f"no namespaces ({probe.stderr.strip()})" if probe.returncode else None


class Hosts:
    """The two hosts, started; a context at whose end nothing of them is left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._outer: dict[str, subprocess.Popen] = {}
        self._first: dict[str, int] = {}

    def __enter__(self) -> Hosts:
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        for own in NAMES:  # as on many machines, a host's own name is its loopback: nothing may rely on it
            known = [f"{a if name != own else '127.0.1.1'} {name}" for a, name in zip(ADDRESSES, NAMES, strict=True)]
            (self.folder / f"hosts_{own}").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
        (self.folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=self.folder))
        try:
            self._open(
                _SWITCH, "set -e; ip link add switch type bridge; ip link set switch up; echo up; read -r _ || true"
            )
            for name in NAMES:
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._outer):
            self.crash(name)

    def boot(self, name: str) -> None:
        """Start a host and connect it to the switch."""
        number = NAMES.index(name)
        self._open(name, _INIT.format(folder=self.folder, name=name))
        ends = self._first[_SWITCH], self._first[name]
        cable = f"link add port{number} netns {ends[0]} type veth peer name {INTERFACE} netns {ends[1]}"
        subprocess.run(["ip", *cable.split()], check=True, env=os.environ | {"PATH": _SEARCHED})
        for host, command in (
            (_SWITCH, f"link set port{number} master switch up"),
            (name, f"addr add {ADDRESSES[number]}/24 dev {INTERFACE}"),
            (name, f"link set {INTERFACE} address 02:00:00:00:00:0{number + 1} up"),  # it keeps it when it boots again
        ):
            assert self.run(["ip", *command.split()], on=host).returncode == 0

    def _open(self, name: str, script: str) -> None:
        """Make the namespaces of a host, whose first process runs a script, says "up" and waits."""
        outer = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "bash", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PATH": _SEARCHED},
        )
        self._outer[name] = outer
        assert outer.stdout is not None
        assert outer.stdout.readline() == "up\n", f"{name} did not come up"
        (first,) = psutil.Process(outer.pid).children()
        self._first[name] = first.pid

    def crash(self, name: str) -> None:
        """End a host with everything on it, as when its power fails."""
        outer = self._outer.pop(name)
        with contextlib.suppress(psutil.Error):
            psutil.Process(self._first.pop(name)).kill()
        outer.wait(timeout=30)
        assert outer.stdin is not None
        assert outer.stdout is not None
        outer.stdin.close()
        outer.stdout.close()

    def command(self, command: list[str], *, on: str = NAMES[0]) -> list[str]:
        """The command line that runs a command on a host, to be started from here."""
        flags = ["--net", "--pid", "--uts", "--mount", f"--wd={os.getcwd()}"]
        return ["nsenter", "--target", str(self._first[on]), *flags, "--", *command]

    def start(self, command: list[str], *, on: str = NAMES[0], **options: object) -> subprocess.Popen:
        """Start a command on a host; its output through pipes."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command(command, on=on), **{**pipes, **options})  # type: ignore[call-overload]

    def run(
        self, command: list[str], *, on: str = NAMES[0], timeout: float = 600, **options
    ) -> subprocess.CompletedProcess:
        """Run a command on a host to its end."""
        options.setdefault("env", os.environ | {"PATH": _SEARCHED})
        process = self.start(command, on=on, **options)
        try:
            said, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                self.end_jobs()
        return subprocess.CompletedProcess(command, process.returncode, said, "")

    def processes(self, name: str, *words: str) -> list[psutil.Process]:
        """What runs on a host with all of the words in its command line; nothing on one that is down."""
        if name not in self._first:
            return []
        space = os.readlink(f"/proc/{self._first[name]}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != self._first[name]
                if there and all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def end_jobs(self) -> None:
        """Kill the ranks on both hosts; their launchers end with them."""
        for name in NAMES:
            for process in self.processes(name, "train_ki.sh"):
                with contextlib.suppress(psutil.Error, OSError):  # it has ended meanwhile
                    self.kill(process)

    def wait_until_idle(self, *, seconds: float) -> list[str]:
        """What still runs of a job on either host after so many seconds; nothing, once it has ended."""
        until = time.monotonic() + seconds
        while left := [p for name in NAMES for p in self.processes(name, "train_ki.sh")]:
            if time.monotonic() > until:
                return [" ".join(p.cmdline()) for p in left]
            time.sleep(0.1)
        return []

    def kill(self, process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a process of a host, and nothing else."""
        spaces = {os.readlink(f"/proc/{first}/ns/pid") for first in self._first.values()}
        assert os.readlink(f"/proc/{process.pid}/ns/pid") in spaces
        process.send_signal(number)
