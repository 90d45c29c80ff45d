import json
import socket
import subprocess
import sys
import threading

import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.ranks import world as distributed
from tests.tiny import ROOT, environment, run_ranks

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


STEP_ON_ONE_NODE = SRUN | {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "8",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
}


def test_a_step_on_one_node_asks_nobody_for_its_host_and_has_a_port_of_its_own(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    ports = []
    for step in ("0", "1"):
        env = STEP_ON_ONE_NODE | {"SLURM_STEP_ID": step}
        distributed.repair_environment(env)
        assert (env["MASTER_ADDR"], env["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "8")
        ports.append(env["MASTER_PORT"])
    assert ports[0] != ports[1]


def test_a_first_host_that_slurm_does_not_name_is_one_line(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "", ""))
    with pytest.raises(UserError, match="does not name the first host; export MASTER_ADDR before srun"):
        distributed.repair_environment(dict(SRUN))


def test_mpirun_across_hosts_needs_no_mpi_where_the_user_says_where_to_meet():
    env = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29999"}
    distributed.repair_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("1", "2", "head", "29999")


def test_a_single_rank_started_by_hand_needs_no_address():
    env = {"RANK": "0", "WORLD_SIZE": "1"}
    distributed.repair_environment(env)
    assert env["MASTER_ADDR"] == "127.0.0.1"
    assert int(env["MASTER_PORT"]) > 1024


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"WORLD_SIZE": ""}, "RANK=1 WORLD_SIZE= of a launcher: no numbers; a launcher sets both"),
        ({"RANK": "one"}, "RANK=one WORLD_SIZE=2 of a launcher: no numbers"),
        ({"RANK": "2"}, "a rank lies in 0 to WORLD_SIZE - 1"),
        ({"MASTER_ADDR": ""}, "but no MASTER_ADDR; give the host of rank 0"),
        ({"MASTER_PORT": ""}, "but no MASTER_PORT; give a free port"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x is no port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
    ],
)
def test_what_no_launcher_sets_is_one_line(changed, line):
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", **changed}
    with pytest.raises(UserError) as caught:
        distributed.repair_environment(env)
    assert line in str(caught.value)


# --- a port that nobody asked for ---

BELOW_DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
# deepspeed's runner, its launcher, a rank: each started by the one before, as it does it
FAMILY = """
import os, subprocess, sys
level = int(sys.argv[1])
if level < 2:
    env = os.environ | ({"CROSS_RANK": "0"} if level == 1 else {})
    sys.exit(subprocess.call([sys.executable, "-c", sys.argv[2], str(level + 1), *sys.argv[2:]], env=env))
from ki_ds.ranks.world import repair_environment
env = dict(os.environ, RANK="1", WORLD_SIZE="2", LOCAL_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
repair_environment(env)
print(env["MASTER_PORT"])
"""


def ports_below_deepspeed(*jobs):
    """The ports that the ranks of jobs find, each a pair of the runner's arguments and its environment."""
    command = [sys.executable, "-c", FAMILY, "0", FAMILY]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [subprocess.Popen([*command, *words], env=environment(**env), **pipes) for words, env in jobs]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_deepspeeds_usual_port_is_a_jobs_own_unless_it_was_asked_for():
    own, asked, said = ports_below_deepspeed(
        ([], {}), (["--master_port", "29500"], {"MASTER_PORT": "31001"}), ([], {"MASTER_PORT": "31002"})
    )
    assert own != "29500"
    assert 10_000 <= int(own) < 32_000
    assert (asked, said) == ("29500", "31002")


@pytest.mark.parametrize("changed", [{"MASTER_PORT": "29501"}, {"LOCAL_SIZE": "1"}, {"CROSS_RANK": None}])
def test_a_port_that_somebody_chose_or_other_hosts_know_stays(changed):
    env = {name: value for name, value in (BELOW_DEEPSPEED | changed).items() if value is not None}
    before = dict(env)
    distributed.repair_environment(env)
    assert env == before


# --- threads ---


@pytest.mark.parametrize(("said", "expected"), [(None, None), ("", None), ("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_threads_that_the_user_asked_for(said, expected):
    assert distributed.threads_asked_for({} if said is None else {"OMP_NUM_THREADS": said}) == expected


@pytest.mark.parametrize("said", ["0", "-1", "many", "1.5"])
def test_a_number_of_threads_that_is_none_is_one_line(said):
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS={said} is no number of threads"):
        distributed.threads_asked_for({"OMP_NUM_THREADS": said})


def test_the_one_thread_that_torchrun_sets_is_not_the_users(monkeypatch):
    class Launcher:
        def __init__(self, **environ):
            self.environ = lambda: environ

    env = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    for launcher, expected in ((Launcher(), None), (Launcher(OMP_NUM_THREADS="1"), 1), (None, 1)):
        monkeypatch.setattr(distributed, "_launcher_without", lambda *_, found=launcher: found)
        assert distributed.threads_asked_for(env) == expected


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([{0, 1, 2, 3}] * 2, [2, 2]),
        ([{0, 1, 2}] * 2, [1, 1]),
        ([{0}] * 4, [1] * 4),  # at least one
        ([{0, 1}, {2, 3}], [2, 2]),  # bound by the launcher: each rank's own
        ([{0, 1, 2, 3}, {2, 3}], [3, 1]),
    ],
)
def test_cores_are_shared_by_the_ranks_that_may_run_on_them(masks, expected, monkeypatch):
    port, found, own = distributed.free_port(), {}, threading.local()
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda _: masks[own.rank])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)

    def come(rank):
        own.rank = rank
        env = {"RANK": str(rank), "WORLD_SIZE": str(len(masks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found[rank] = (distributed.meet(env, seconds=20), distributed.share_of_cores())

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(masks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[rank][1] for rank in range(len(masks))] == expected


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


def test_nccl_is_told_the_very_interface_unless_it_is_loopback(monkeypatch):
    monkeypatch.setattr(distributed, "interface_to", lambda host: {"far": "eth1", "here": "lo"}[host])
    env = {"MASTER_ADDR": "far"}
    distributed.pick_interface(env)
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")
    env = {"MASTER_ADDR": "here"}
    distributed.pick_interface(env)
    assert (env["GLOO_SOCKET_IFNAME"], "NCCL_SOCKET_IFNAME" in env) == ("lo", False)
    env = {"MASTER_ADDR": "far", "NCCL_SOCKET_IFNAME": "ib"}
    distributed.pick_interface(env)
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("eth1", "ib")


# --- the meeting ---


def ranks_that_meet(*numbers, world, seconds=2.0, port=None):
    """What each of the ranks that come, here as threads, ends with: None, or its error."""
    port, found = port or distributed.free_port(), {}

    def come(place, number):
        env = {"RANK": str(number), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            found[place] = distributed.meet(env | {"LOCAL_RANK": str(number)}, seconds=seconds)
        except UserError as error:
            found[place] = error

    threads = [threading.Thread(target=come, args=pair) for pair in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] if isinstance(found[place], UserError) else None for place in range(len(numbers))]


def test_all_ranks_come():
    assert ranks_that_meet(0, 1, 2, world=3, seconds=20) == [None, None, None]


def test_ranks_that_do_not_come_are_named_by_those_that_did():
    errors = ranks_that_meet(0, 2, world=4)
    for error in errors:
        assert "rank 1, 3 of 4 has not come within 2 s" in str(error)
        assert error.said_by_main  # rank 0 is among them


def test_without_rank_0_each_host_says_so():
    (error,) = ranks_that_meet(1, world=2)
    assert "cannot be used by rank 1" in str(error)
    assert error.said_by_main  # LOCAL_RANK 1: the first rank of this host says it
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": distributed.free_port()}
    with pytest.raises(UserError, match="cannot be used by rank 1 on ") as caught:
        distributed.meet(env | {"LOCAL_RANK": "0"}, seconds=1)
    assert not caught.value.said_by_main


def test_a_rank_that_comes_twice_is_refused():
    errors = ranks_that_meet(0, 1, 1, world=2, seconds=20)
    assert sorted(map(str, errors))[:2] == ["None", "None"]
    (error,) = [error for error in errors if error is not None]
    assert "two processes call themselves rank 1" in str(error)
    assert not error.said_by_main


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        (error,) = ranks_that_meet(0, world=2, port=str(server.getsockname()[1]))
    assert "cannot be used by rank 0" in str(error)
    assert "--master_port 29501 (deepspeed, torchrun), else MASTER_PORT=29501" in str(error)


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
    assert distributed.Notes("alone").to_main("note") == ["note"]
    assert distributed.Notes("alone").from_main("answer") == "answer"
    distributed.say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("code", [0, 5])
def test_alone_leaving_is_an_ordinary_exit(code, monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    with pytest.raises(SystemExit) as caught:
        distributed.leave(code)
    assert caught.value.code == code


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
        assert values["notes"] == [[{"rank": 0}, {"rank": 1}] if rank == 0 else [], "rank 0 answers"]
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
