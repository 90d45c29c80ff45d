import subprocess

import pytest

from ki_ds import cli as launcher
from ki_ds.errors import UserError
from ki_ds.planning import dry_run
from tests.tiny import ROOT, environment, tiny_corpus

RUN = ["--run_dir", "runs/x", "--data.corpus", "not/there", "--data.seq_len", "64", "--model.num_layers", "2"]
RUN += ["--train.micro_batch_size", "4", "--train.global_batch_size", "32"]
PLAN = ["--dry_run", *RUN, "--vocab_size", "640"]


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    """An empty working folder, in no job."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "KI_DS_ARGS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_it_prints_and_writes_nothing(anywhere, capsys):
    launcher._run([*PLAN, "--num_gpus", "2", "--device", "H100", "--engine.precision", "bf16"], 0.0)
    said = capsys.readouterr().out
    for words in (
        "parameters",
        "memory a rank",
        "2 ranks",
        "FLOPs, student",
        "hours",
        "sent a step and rank",
        "disk of the run",
    ):
        assert words in said
    assert "unknown" not in said
    assert list(anywhere.iterdir()) == []


def test_a_peak_that_is_not_known_leaves_the_time_open(anywhere, capsys):
    dry_run.show([*PLAN, "--device", "cpu"])
    assert "give --peak_tflops" in capsys.readouterr().out
    dry_run.show([*PLAN, "--device", "cpu", "--peak_tflops", "0.1"])
    assert "unknown" not in capsys.readouterr().out


def test_only_rank_0_prints_and_the_ranks_are_the_launchers(anywhere, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    dry_run.show(PLAN)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    dry_run.show(PLAN)
    assert "4 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "env", "expected"),
    [
        (None, {}, 1),
        (8, {}, 8),
        (None, {"KI_DS_ARGS": "--num_gpus 2 --master_port 1"}, 2),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, 4),
        (None, {"WORLD_SIZE": "4"}, 1),  # a variable that others set as well
        (None, {"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    ],
)
def test_ranks(given, env, expected):
    assert dry_run._num_ranks(given, env) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry_run", *RUN], "not/there .* --vocab_size"),
        ([*PLAN, "--num_gpus", "0"], "--num_gpus 0"),
        ([*PLAN, "--num_gpus", "many"], "num_gpus"),
        ([*PLAN, "--device", "abacus"], "--device abacus is not known"),
        ([*PLAN, "--vocab_size", "1"], "--vocab_size 1"),
        ([*PLAN, "--optim.lrr", "1"], "optim.lrr"),
        ([*PLAN, "--max_restarts", "1"], "--max_restarts has no meaning with --dry_run"),
        ([*RUN, "--mfu", "0.5"], "--mfu is an option of a plan"),
        ([*RUN, "--num_gpus=2"], "--num_gpus is an option of a plan"),
        ([*PLAN, "--teacher.path", "t", "--inherit.schedule", "constant"], "teacher.path=t is no model"),
    ],
)
def test_bad_input_is_one_line(arguments, words, anywhere):
    with pytest.raises(UserError, match=words) as caught:
        launcher._run(arguments, 0.0)
    assert "\n" not in str(caught.value)
    assert list(anywhere.iterdir()) == []


def test_the_vocabulary_is_the_corpuss_own(anywhere, capsys):
    corpus = tiny_corpus(anywhere / "corpus", num_documents=20)
    before = sorted(anywhere.rglob("*"))
    dry_run.show(["--dry_run", *RUN, "--data.corpus", str(corpus), "--model.vocab_multiple", "1"])
    own = capsys.readouterr().out
    dry_run.show([*PLAN, "--vocab_size", "320", "--model.vocab_multiple", "1"])
    assert capsys.readouterr().out == own
    assert sorted(anywhere.rglob("*")) == before


def test_the_launcher_knows_a_plans_options():
    options = {option for action in dry_run._parser()._actions for option in action.option_strings}
    assert options - {"-h", "--help", "--dry_run"} == set(launcher.PLAN_OPTIONS)


def test_bash_starts_no_launcher(tmp_path):
    command = ["bash", str(ROOT / "launchers" / "train_ki.sh"), *PLAN, "--num_gpus", "2"]
    env = environment(KI_DS_ARGS="--no_such_option")  # deepspeed would fail on it
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "2 ranks" in result.stdout
    assert list(tmp_path.iterdir()) == []
