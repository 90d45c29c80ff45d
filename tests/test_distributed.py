import json
import socket
import subprocess

import pytest
import torch

from ki_ds import distributed
from ki_ds.errors import UserError
from tests.tiny import run_ranks

MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-417@1",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "4711",
}


# --- what mpirun and srun leave unsaid ---


def test_mpirun_on_one_host_is_mapped():
    env = dict(MPIRUN)
    distributed.repair_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == ("1", "2", "1", "2")
    assert env["MASTER_ADDR"] == "127.0.0.1"


def test_all_ranks_of_a_job_meet_at_one_port_and_another_job_at_another():
    ports = []
    for changed in ({}, {"OMPI_COMM_WORLD_RANK": "0"}, {"PMIX_NAMESPACE": "prterun-host-418@1"}):
        env = MPIRUN | changed
        distributed.repair_environment(env)
        ports.append(int(env["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2]
    assert all(1024 < port < 65536 for port in ports)


def test_mpirun_across_hosts_is_left_to_the_engine():
    env = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    before = dict(env)
    distributed.repair_environment(env)
    assert env == before


def test_srun_is_mapped_to_the_first_host_of_the_step(monkeypatch):
    asked = []

    def scontrol(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "node07\nnode08\n", "")

    monkeypatch.setattr(subprocess, "run", scontrol)
    env = dict(SRUN)
    distributed.repair_environment(env)
    assert asked == [["scontrol", "show", "hostnames", "node[07-08]"]]
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("5", "8", "1")
    assert env["MASTER_ADDR"] == "node07"
    assert 1024 < int(env["MASTER_PORT"]) < 65536


@pytest.mark.parametrize("outer", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_what_a_launcher_has_said_stays(outer, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    env = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1", **outer}
    before = dict(env)
    distributed.repair_environment(env)
    assert env == before


@pytest.mark.parametrize("outer", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_an_address_that_the_user_gave_stays(outer, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "node07\n", ""))
    env = {"MASTER_ADDR": "head", "MASTER_PORT": "29999", **outer}
    distributed.repair_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("head", "29999")


def test_without_any_launcher_nothing_is_made_up():
    env: dict[str, str] = {}
    distributed.repair_environment(env)
    distributed.pick_interface(env)
    assert env == {}


# --- the interface ---


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_interface_that_routes_to_the_master(host):
    env = {"MASTER_ADDR": host}
    distributed.pick_interface(env)
    assert env["GLOO_SOCKET_IFNAME"].startswith("lo")


def test_an_interface_that_the_user_chose_stays():
    env = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib7"}
    distributed.pick_interface(env)
    assert env["GLOO_SOCKET_IFNAME"] == "ib7"


def test_a_master_that_nobody_knows_is_one_line():
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid cannot be reached") as caught:
        distributed.pick_interface({"MASTER_ADDR": "no-such-host.invalid"})
    assert "\n" not in str(caught.value)


def test_a_free_port_can_be_listened_on():
    with socket.socket() as server:
        server.bind(("127.0.0.1", int(distributed.free_port())))


# --- one process ---


def test_alone_every_collective_is_the_identity(capsys):
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.all_sum(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    value = object()
    assert distributed.from_main(value) is value
    distributed.barrier()
    distributed.together(None)
    mine = UserError("mine")
    with pytest.raises(UserError) as caught:
        distributed.together(mine)
    assert caught.value is mine
    assert not mine.said_by_main  # no other rank says it, whatever RANK may be in the environment
    distributed.say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("code", [0, 5])
def test_alone_leaving_is_an_ordinary_exit(code, monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as caught:
        distributed.leave(code)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "3"}, 3),
    ],
)
def test_ranks_of_this_host_as_any_launcher_says_them(said, expected, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert distributed.local_world_size() == expected


# --- two ranks ---


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(["-m", "tests.workers.collectives", "0", "0"], world=2, timeout=120)


def test_two_ranks_agree(two_ranks):
    lines = [result.stdout.splitlines() for result in two_ranks]
    found = [json.loads(line[-1]) for line in lines]
    for rank, values in enumerate(found):
        assert values.pop("is_main") == (rank == 0)
        assert values["sum"] == [2.0, 10.0]
        assert values["from_main"] == {"who": 0}
        assert values["nobody"] is None
        assert values["only_1"] == ["one", True]
        assert values["both"] == ["rank 0", True]
        assert values["exit_code"] == 2
        assert values["interface"].startswith("lo")
    assert lines[0][0] == "said once"
    assert len(lines[1]) == 1


def test_an_error_of_any_rank_is_printed_once_by_rank_0(two_ranks):
    said = [[line for line in r.stderr.splitlines() if line.startswith("error:")] for r in two_ranks]
    assert said == [["error: rank 1 has no disk left"], []]


def test_ranks_leave_with_their_code_and_never_come_back(two_ranks):
    assert [result.returncode for result in two_ranks] == [0, 0]
    failed = run_ranks(["-m", "tests.workers.collectives", "3", "4"], world=2, timeout=120)
    assert [result.returncode for result in failed] == [3, 4]
    for result in (*two_ranks, *failed):
        assert result.stdout.endswith("}\n")  # flushed, and nothing after it
        assert "Traceback" not in result.stderr
