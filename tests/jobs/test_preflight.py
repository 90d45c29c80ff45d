"""Everything that stops a job on many hosts is said before it starts; with stand-ins for pdsh and the hosts."""

import os
import socket
import sys

import pytest

from ki_ds.errors import UserError
from ki_ds.jobs import preflight
from ki_ds.jobs.preflight import Problem, Question, answer, carried, problems, read_hosts, write_environment
from ki_ds.ranks.world import free_port
from tests import forked
from tests.tiny import ROOT, environment

GOOD = {
    "python": "3.11.2",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "ki_ds": "0.1 abc"},
    "cores": 8,
    "gpus": 4,
    "folder": "/shared/runs",
    "free_bytes": 2**40,
    "unset": [],
    "interface": "eth0",
    "skew": 0.2,
}
FIRST = GOOD | {"address": "10.0.0.1", "port_free": True}
OTHER = GOOD | {"sees_token": True, "unreachable": None}


def found(first=FIRST, other=OTHER, slots=(4, 4), silent=None):
    answers = {"a": first} | ({} if other is None else {"b": other})
    return problems(dict(zip("ab", slots, strict=True)), answers, silent or {}, master_port=29501)


def test_hosts_that_agree_have_no_problem():
    assert found() == []
    assert found(FIRST | {"gpus": 0}, OTHER | {"gpus": 0}) == []  # a job on CPUs


@pytest.mark.parametrize(
    ("change", "words", "fatal"),
    [
        ({"python": "3.12.1"}, "Python is 3.12.1, on a 3.11.2", True),
        ({"packages": GOOD["packages"] | {"torch": "2.12.0"}}, "torch is 2.12.0, on a 2.13.0; install the same", True),
        ({"packages": GOOD["packages"] | {"ki_ds": "0.1 xyz"}}, "ki_ds is 0.1 xyz", True),
        ({"packages": GOOD["packages"] | {"deepspeed": None}}, "deepspeed is not installed; pip install", True),
        ({"gpus": 2}, "2 GPUs for slots=4; lower its slots", True),
        ({"gpus": 0}, "0 GPUs for slots=4", True),
        ({"sees_token": False}, "/shared/runs is not the folder of a; put run_dir on a shared file system", True),
        ({"free_bytes": 2**29}, "0.50 GiB free in /shared/runs; make room", False),
        ({"free_bytes": 2**20}, "0.00 GiB free", True),
        ({"skew": -60.0}, "its clock is -60 s off that of a; start its time service", False),
        ({"interface": None}, "no interface leads to 10.0.0.1; give --master_addr", True),
        ({"interface": "lo"}, "10.0.0.1 is its own loopback", True),
        ({"unreachable": "timed out"}, "10.0.0.1 port 29501 cannot be reached (timed out); open the firewall", True),
        ({"unset": ["HF_HOME"]}, "HF_HOME would not reach it; call this with --write_env", False),
    ],
)
def test_each_difference_is_one_line_with_its_fix(change, words, fatal):
    (problem,) = found(other=OTHER | change)
    assert words in str(problem)
    assert (problem.host, problem.fatal, "\n" in str(problem)) == ("b", fatal, False)
    assert str(problem).startswith("error: b: " if fatal else "warning: b: ")


def test_what_is_wrong_with_the_first_host_and_with_a_silent_one():
    assert "port 29501 is in use" in str(found(FIRST | {"port_free": False})[0])
    assert "cannot be written (Permission denied)" in str(found(FIRST | {"cannot_write": "Permission denied"})[0])
    for port, fatal in ((29500, False), (29501, True)):  # a job on one host leaves DeepSpeed's default by itself
        (problem,) = problems({"a": 4}, {"a": FIRST | {"port_free": False}}, {}, master_port=port)
        assert (problem.what, problem.fatal) == (f"port {port} is in use", fatal)
    cores = {"gpus": 0, "cores": 2}
    assert not found(FIRST | cores, OTHER | {"gpus": 0})[0].fatal
    (problem,) = found(other=None, silent={"b": "ssh: connect to host b port 22: No route to host"})
    assert problem == Problem("b", "gave no answer (ssh: connect to host b port 22: No route to host)", problem.fix)


def test_ssh_is_asked_whether_it_would_miss_a_host(tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text('#!/bin/sh\necho "host $3"\necho "serveraliveinterval ${2#*=}"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for seconds, never in (("0", True), ("15", False)):
        monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"-o ServerAliveInterval={seconds}")
        assert preflight._never_missed("a") == never


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is no file; give a hostfile"),
        ("", "empty"),
        ("a slots=2\na slots=1\n", "multiple entries for a"),
        ("a slots=two\n", "bad entry: a slots=two"),
        ("a 4\n", "bad entry: a 4"),
        ("a;reboot slots=1\n", "'a;reboot' is no host name"),
        ("$(id) slots=1\n", "is no host name"),
        ("-oProxyCommand=x slots=1\n", "is no host name"),
        ("a,b slots=1\n", "'a,b' is no host name"),
        ("a slots=0\n", "a slots=0 starts no rank"),
    ],
)
def test_a_malformed_hostfile_is_one_line(text, words, tmp_path):
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="hostfile") as caught:
        read_hosts(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hostfile_is_read_in_its_order(tmp_path):
    (tmp_path / "hostfile").write_text("# ours\nnode-2.local slots=4\n10.0.0.1   slots=2 # old\n\n")
    assert list(read_hosts(str(tmp_path / "hostfile")).items()) == [("node-2.local", 4), ("10.0.0.1", 2)]


def test_a_host_answers_about_itself(tmp_path):
    question = Question(str(tmp_path / "runs" / "x"), "token", True, int(free_port()), None, ("PATH", "KI_DS_NOT_SET"))
    said = answer(question)
    assert said["folder"] == str(tmp_path)
    assert (tmp_path / ".token").exists()
    assert said["port_free"]
    assert said["unset"] == ["KI_DS_NOT_SET"]
    assert said["packages"]["torch"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not answer(Question(str(tmp_path), "token", True, port))["port_free"]
        other = answer(Question(str(tmp_path), "token", False, port, "127.0.0.1"))
        assert (other["sees_token"], other["unreachable"], other["interface"]) == (True, None, "lo")
    assert not answer(Question(str(tmp_path), "another", False, port, "127.0.0.1"))["sees_token"]
    assert (
        answer(Question(str(tmp_path), "token", False, port, "127.0.0.1"))["unreachable"] is None
    )  # refused: it is up


PDSH = """#!/usr/bin/env bash
# the hosts of -w, one after another, on this machine; one of the name `dead` is not reached
hosts=$(sed 's/.* -w \\([^ ]*\\) .*/\\1/' <<< "$*"); command="${@: -1}"
for host in ${hosts//,/ }; do
    if [ $host = dead ]; then
        echo "dead: ssh: no route to host dead" >&2
        echo "pdsh@x: dead: ssh exited with exit code 255" >&2
    else bash -c "${command//%%/%}" | sed "s/^/$host: /"; fi
done
"""


@pytest.fixture
def tool(tmp_path):
    """tool(*arguments): the command line tool among stand-ins for other hosts; what it says and its exit code."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pdsh").write_text(PDSH)
    (tmp_path / "bin" / "pdsh").chmod(0o755)
    folder = tmp_path / "it's 100% odd"
    folder.mkdir()

    def call(*arguments):
        env = environment(PYTHONPATH=str(ROOT), HOME=str(tmp_path), COLUMNS="200")
        env["PATH"] = f"{tmp_path / 'bin'}:{env['PATH']}"
        command = [sys.executable, str(ROOT / "tools" / "preflight.py"), "--run_dir", "runs", *arguments]
        done = forked.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr, done.returncode

    call.folder = folder
    return call


def test_the_tool_asks_every_host_and_leaves_nothing(tool):
    hostfile = tool.folder / "hostfile"
    hostfile.write_text("node1 slots=1\ndead slots=1\n")
    said, code = tool("--hostfile", "hostfile", "--master_port", free_port(), "--master_addr", "127.0.0.1")
    assert code == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: dead: gave no answer (ssh: no route to host dead); see `ssh HOST true`"]
    row = next(line for line in said.splitlines() if "node1" in line)
    assert "first" in row
    assert os.listdir(tool.folder) == ["hostfile"]


def test_the_tool_without_hosts_looks_at_this_one(tool):
    said, code = tool("--master_port", free_port(), "--write_env")
    assert (code, said.count("warning:"), said.count("error:")) == (0, 0, 0), said
    assert socket.gethostname() in said
    assert "OMP_NUM_THREADS=1" in (tool.folder / ".deepspeed_env").read_text().splitlines()


def test_settings_are_written_beside_the_users_own(tmp_path):
    path = tmp_path / ".deepspeed_env"
    path.write_text("MINE=1\nHF_HOME=/old\n")
    env = {"HF_HOME": "/new", "GLOO_SOCKET_IFNAME": "ib0", "HF_TOKEN": "secret", "PYTHONPATH": "/x", "SHELL": "/bin/sh"}
    assert carried(env) == {"HF_HOME": "/new", "GLOO_SOCKET_IFNAME": "ib0"}
    assert write_environment(path, env) == ["GLOO_SOCKET_IFNAME", "HF_HOME"]
    assert path.read_text() == "MINE=1\nGLOO_SOCKET_IFNAME=ib0\nHF_HOME=/new\n"
    for value in ("a$b", 'a"b', "a`id`", "a\\b", "a\nb"):
        with pytest.raises(UserError, match="HF_HOME="):
            write_environment(path, env | {"HF_HOME": value})
    assert path.read_text() == "MINE=1\nGLOO_SOCKET_IFNAME=ib0\nHF_HOME=/new\n"


def test_a_name_in_deepspeeds_file_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/x\n")
    assert preflight._told() == {"HF_HOME"}
