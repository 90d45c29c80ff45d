"""A look at every host before a job is started on it: one table, and a line for everything that is wrong.

The hosts are asked through pdsh and ssh with the same Python, folder and settings as DeepSpeed's launcher would use to
start ranks there, so that what stops a job is found before it waits for itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import ki_ds
from ki_ds.errors import UserError
from ki_ds.files import write_atomically
from ki_ds.ranks.world import interface_to

_PACKAGES = ("torch", "deepspeed", "transformers")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_CARRIED = ("GLOO_", "NCCL_", "HF_", "OMP_", "TORCH_", "TRITON_", "TOKENIZERS_", "LD_LIBRARY_PATH", "PATH")
_EXPORTED = ("PYTHON", "NCCL_")  # by DeepSpeed itself
_SECRET = re.compile(r"TOKEN$|KEY|SECRET|PASSWORD")
_UNSPEAKABLE = re.compile(r'["$`\\\n]')  # DeepSpeed puts values between double quotes, for a shell
_SKEW_SECONDS = 5.0
_ANSWER_SECONDS = 180
_SILENT_DEATH = (
    "ssh would wait for ever for it, should it fail",
    "start with bash launchers/train_ki.sh, or export PDSH_SSH_ARGS_APPEND='-o ServerAliveInterval=15'",
)
_GIB = 2**30
DEFAULT_PORT = 29500  # DeepSpeed's


# --- on a host ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a host is asked.

    Args:
        run_dir: the job's folder, which need not be there yet.
        token: a name that nobody else uses; the first host writes a file of it into the folder, the others look for it.
        first: whether this host is the one with rank 0.
        master_addr: how the others reach the first; None on the first one, which says its own address.
        environment: names of variables that a job would want there.
    """

    run_dir: str
    token: str
    first: bool
    master_port: int
    master_addr: str | None = None
    environment: tuple[str, ...] = ()


def answer(question: Question) -> dict[str, Any]:
    """What this host has to say, as JSON."""
    folder = _existing(Path(question.run_dir))
    token = folder / f".{question.token}"
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES} | {"ki_ds": f"{ki_ds.__version__} {_sources()}"},
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _num_gpus(),
        "folder": str(folder),
        "free_bytes": shutil.disk_usage(folder).free,
        "interface": None,
        "unset": [name for name in question.environment if name not in os.environ],
    }
    if question.first:
        try:
            token.touch()
        except OSError as error:
            found["cannot_write"] = error.strerror
        found["address"] = question.master_addr or _own_address()
        found["port_free"] = _is_free(question.master_port)
        with contextlib.suppress(OSError):
            found["interface"] = interface_to(found["address"])
    else:
        assert question.master_addr is not None
        found |= {"sees_token": token.exists()} | _route_to_first(question.master_addr, question.master_port)
    return found | {"time": time.time()}


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sources() -> str:
    """A short hash of this package's code."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _own_address() -> str:
    """As DeepSpeed's launcher finds the first host's address."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True)
    return (said.stdout.split() or [socket.gethostname()])[0]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _route_to_first(host: str, port: int) -> dict[str, str | None]:
    """The interface that leads to the first host, and why no connection comes through.

    A refused one does come through: nobody listens there yet.
    """
    interface = unreachable = None
    with contextlib.suppress(OSError):
        interface = interface_to(host)
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        pass
    except OSError as error:
        unreachable = str(error)
    return {"interface": interface, "unreachable": unreachable}


# --- from here ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is wrong with a host and how to mend it; `fatal` if a job could not run."""

    host: str
    what: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.host}: {self.what}; {self.fix}"


def read_hosts(hostfile: str) -> dict[str, int]:
    """{host: slots} of a hostfile, as DeepSpeed reads it.

    Raises:
        UserError: it is missing or malformed, or names what is no host.
    """
    from ki_ds.engine.student import read_hostfile

    hosts = read_hostfile(hostfile)
    for host, slots in hosts.items():
        if not _HOST.fullmatch(host):
            raise UserError(f"{hostfile}: {host!r} is no host name; write a name or address without a user or port")
        if slots < 1:
            raise UserError(f"{hostfile}: {host} slots={slots} starts no rank there; leave the host out")
    return hosts


def check(
    hosts: Mapping[str, int], run_dir: str, *, master_port: int, master_addr: str | None = None, ssh_port: int | None
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Ask all hosts; their answers, and what is wrong. Nothing is left on them."""
    first, *others = hosts
    wanted = tuple(sorted(set(carried(os.environ)) - _told()))
    token = f"ki_ds_preflight_{secrets.token_hex(8)}"
    question = Question(run_dir, token, True, master_port, master_addr, wanted)
    answers, silent = ask([first], question, ssh_port=ssh_port)
    try:
        if others and first in answers:
            master_addr = answers[first]["address"]
            question = Question(run_dir, token, False, master_port, master_addr, wanted)
            more, also_silent = ask(others, question, ssh_port=ssh_port)
            answers, silent = answers | more, silent | also_silent
    finally:
        if first in answers and not answers[first].get("cannot_write"):
            _pdsh([first], ["rm", "-f", f"{answers[first]['folder']}/.{token}"], ssh_port=ssh_port)
    unnoticed = [Problem(host, *_SILENT_DEATH, fatal=False) for host in answers if _never_missed(host)]
    return answers, problems(hosts, answers, silent, master_port=master_port) + unnoticed


def _never_missed(host: str) -> bool:
    """Whether ssh, as pdsh calls it, would wait for ever for a host that fails."""
    options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        said = subprocess.run(["ssh", *options, "-G", host], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return False
    return "serveraliveinterval 0" in said.splitlines()


def check_this_host(run_dir: str, *, master_port: int) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """As `check`, for a job on this host alone."""
    token = f"ki_ds_preflight_{secrets.token_hex(8)}"
    found = answer(Question(run_dir, token, True, master_port, "127.0.0.1"))
    Path(found["folder"], f".{token}").unlink(missing_ok=True)
    name = socket.gethostname()
    answers = {name: found | {"skew": 0.0}}
    return answers, problems({name: 1}, answers, {}, master_port=master_port)


def ask(
    hosts: list[str], question: Question, *, ssh_port: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Answers by host, each with its clock's `skew` in seconds; of those that gave none, what ssh said."""
    command = [sys.executable, "-m", "ki_ds.jobs.preflight", json.dumps(asdict(question))]
    lines, said = _pdsh(hosts, command, ssh_port=ssh_port)
    answers = {}
    for arrived, host, text in lines:
        if text.startswith("{"):
            found = json.loads(text)
            answers[host] = found | {"skew": found["time"] - arrived}
    silent = {}
    for host in hosts:
        if host not in answers:
            own = [line.split(f"{host}: ", 1)[1] for line in said.splitlines() if f"{host}: " in line]
            own = [line for line in own if "exited with exit code" not in line] or own
            silent[host] = own[-1] if own else f"no answer within {_ANSWER_SECONDS} s"
    return answers, silent


def _pdsh(hosts: list[str], command: list[str], *, ssh_port: int | None) -> tuple[list[tuple[float, str, str]], str]:
    """(time, host, text) of every line that a command wrote on the hosts, and what went to stderr."""
    if shutil.which("pdsh") is None:
        raise UserError("pdsh is not installed, which DeepSpeed starts ranks on other hosts with; apt-get install pdsh")
    paths = ":".join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    remote = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(paths)} exec {shlex.join(command)}"
    own = ["-o BatchMode=yes -o ConnectTimeout=10", f"-p {ssh_port}" if ssh_port else ""]
    arguments = " ".join(filter(None, [os.environ.get("PDSH_SSH_ARGS_APPEND"), *own]))
    environment = os.environ | {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": arguments}
    call = ["pdsh", "-S", "-f", "1024", "-u", str(_ANSWER_SECONDS), "-w", ",".join(hosts), remote.replace("%", "%%")]
    lines = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                host, _, text = line.rstrip("\n").partition(": ")
                lines.append((time.time(), host, text))
        errors.seek(0)
        return lines, errors.read()


def problems(
    slots: Mapping[str, int], answers: Mapping[str, Mapping[str, Any]], silent: Mapping[str, str], *, master_port: int
) -> list[Problem]:
    """What is wrong, host by host; everything is compared with the first host that has answered."""
    found = [Problem(host, f"gave no answer ({said})", "see `ssh HOST true`") for host, said in silent.items()]
    if not answers:
        return found
    first, reference = next(iter(answers.items()))
    for host, said in answers.items():
        found += _problems_of(host, said, slots, reference, first, master_port)
    return found


def _problems_of(
    host: str,
    said: Mapping[str, Any],
    slots: Mapping[str, int],
    reference: Mapping[str, Any],
    first: str,
    master_port: int,
) -> Iterable[Problem]:
    mine, theirs = said["python"].split(".")[:2], reference["python"].split(".")[:2]
    if mine != theirs:
        yield Problem(host, f"Python is {said['python']}, on {first} {reference['python']}", "take one for all")
    for name, version in said["packages"].items():
        if version is None:
            yield Problem(host, f"{name} is not installed", "pip install -c constraints.txt -e .")
        elif version != reference["packages"][name] is not None:
            there = f"on {first} {reference['packages'][name]}"
            yield Problem(host, f"{name} is {version}, {there}", "install the same everywhere")
    if (said["gpus"] or reference["gpus"]) and said["gpus"] < slots[host]:
        yield Problem(host, f"{said['gpus']} GPUs for slots={slots[host]}", "lower its slots in the hostfile")
    elif not said["gpus"] and said["cores"] < slots[host]:
        yield Problem(host, f"{said['cores']} CPU cores for slots={slots[host]}", "lower its slots", fatal=False)
    if said.get("cannot_write"):
        yield Problem(host, f"{said['folder']} cannot be written ({said['cannot_write']})", "give another --run_dir")
    if not said.get("sees_token", True):
        yield Problem(host, f"{said['folder']} is not the folder of {first}", "put run_dir on a shared file system")
    if said["free_bytes"] < _GIB:
        free = said["free_bytes"] / _GIB
        yield Problem(host, f"{free:.2f} GiB free in {said['folder']}", "make room for checkpoints", fatal=free < 0.1)
    if abs(said["skew"] - reference["skew"]) > _SKEW_SECONDS:
        skew = said["skew"] - reference["skew"]
        yield Problem(host, f"its clock is {skew:+.0f} s off that of {first}", "start its time service", fatal=False)
    if not said.get("port_free", True):
        fatal = len(slots) > 1 or master_port != DEFAULT_PORT  # on one host a job leaves the default by itself
        yield Problem(host, f"port {master_port} is in use", "give a free one: deepspeed --master_port", fatal)
    if said["interface"] is None:
        yield Problem(host, f"no interface leads to {reference['address']}", "give --master_addr an address of all")
    elif host != first and said["interface"].startswith("lo"):
        what = f"{reference['address']} is its own loopback"
        yield Problem(host, what, "give --master_addr an address that all reach")
    elif said.get("unreachable"):
        what = f"{reference['address']} port {master_port} cannot be reached ({said['unreachable']})"
        yield Problem(host, what, "open the firewall between the hosts")
    if said["unset"]:
        what = f"{', '.join(said['unset'])} would not reach it"
        yield Problem(host, what, "call this with --write_env, which puts them into .deepspeed_env", fatal=False)


def hosts_table(slots: Mapping[str, int], answers: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each host."""
    shown = Table(
        "host", "slots", "GPUs", "cores", "Python", *_PACKAGES, "ki_ds", "free", "shared", "clock", "interface"
    )
    for host, num_slots in slots.items():
        if host not in answers:
            shown.add_row(host, str(num_slots), "no answer")
            continue
        said = answers[host]
        shown.add_row(
            *(host, str(num_slots), str(said["gpus"]), str(said["cores"]), said["python"]),
            *(said["packages"][name] or "none" for name in (*_PACKAGES, "ki_ds")),
            f"{said['free_bytes'] / _GIB:.0f} GiB",
            {True: "yes", False: "no", None: "first"}[said.get("sees_token")],
            f"{round(said['skew'], 1) + 0.0:+.1f} s",
            said["interface"] or "none",
        )
    return shown


# --- the environment of ranks on other hosts ----------------------------------------------------------------------


def carried(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on other hosts want as well, but DeepSpeed does not hand over by itself."""
    return {
        name: value
        for name, value in env.items()
        if name.startswith(_CARRIED) and not name.startswith(_EXPORTED) and not _SECRET.search(name)
    }


def _told() -> set[str]:
    """The names in the files that DeepSpeed's launcher reads."""
    names = set()
    for folder in (Path.home(), Path()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if path.is_file():
            names |= {line.split("=", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines()}
    return names


def write_environment(path: Path, env: Mapping[str, str]) -> list[str]:
    """Put what `carried` finds into a .deepspeed_env, whose other lines stay; the names that were put there.

    Raises:
        UserError: a value that DeepSpeed would hand to a shell, which would change it.
    """
    values = carried(env)
    for name, value in values.items():
        if _UNSPEAKABLE.search(value):
            raise UserError(f"{name}={value!r} holds a sign that a shell would change on the way; set it on every host")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.split("=", 1)[0].strip() not in values and line.strip()]
    write_atomically(path, "".join(f"{line}\n" for line in [*kept, *(f"{n}={v}" for n, v in sorted(values.items()))]))
    return sorted(values)


if __name__ == "__main__":
    print(json.dumps(answer(Question(**json.loads(sys.argv[1])))), flush=True)
