"""Whether a run may start or go on in a folder, and the status that it leaves there."""

import json
import shutil

import pytest
import yaml

from ki_ds.checkpoints import checkpoint
from ki_ds.engine import student as engine
from ki_ds.errors import UserError
from tests.commands import dying
from tests.tiny import inherit, records, run, tiny_config, train_ranks, write_config


def refused(base, name, match, **groups):
    with pytest.raises(UserError, match=match):
        inherit(base, name, **groups)


def test_another_run_in_the_folder(base):
    inherit(base, "taken", train={"stop_at_step": 2})
    refused(base, "taken", "holds a run with optim.lr=0.003, now it is 0.001", optim={"lr": 0.001})
    with checkpoint.claimed(base / "taken"):
        refused(base, "taken", "in use by a job that still runs")
    (base / "stranger").mkdir()
    (base / "stranger" / "thesis.tex").write_text("")
    refused(base, "stranger", "holds thesis.tex but no run")


# --- the status of a run ---


def status(run_dir):
    return json.loads((run_dir / "run.json").read_text())["status"]


def test_a_finished_run_stays_finished_whatever_it_is_called_with(base, capsys):
    run_dir = inherit(base, "done")
    before = {name: (run_dir / name).read_bytes() for name in ("run.json", "config.yaml", "metrics.jsonl")}
    assert status(run_dir) == "finished"
    inherit(base, "done")
    inherit(base, "done", train={"save_every": 3, "stop_at_step": 2})
    assert capsys.readouterr().out.count(f"{run_dir} is finished: step 6") == 2
    refused(base, "done", "optim.lr=0.003", optim={"lr": 0.001})
    refused(base, "done", "past train.num_steps=4", train={"num_steps": 4, "changed_config": "allow"})
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    shutil.rmtree(run_dir / "checkpoints")
    refused(base, "done", "holds a finished run without its checkpoints")
    assert {name: (run_dir / name).read_bytes() for name in before} == before


def test_a_finished_run_called_with_more_ranks_stays_finished(base):
    run_dir = run(base / "done_alone", base / "corpus", train={"num_steps": 2})
    before = (run_dir / "run.json").read_bytes()
    config = write_config(base / "more.yaml", tiny_config(run_dir, base / "corpus", train={"num_steps": 2}))
    results = train_ranks(config, world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    assert "is finished: step 2" in results[0].stdout
    assert (run_dir / "run.json").read_bytes() == before


def test_the_status_of_a_run_that_is_raised_or_killed(base, monkeypatch):
    run_dir, seen = inherit(base, "raised", train={"num_steps": 2}), []
    assert status(run_dir) == "finished"
    step = engine.StudentEngine.step
    monkeypatch.setattr(engine.StudentEngine, "step", lambda *a: seen.append(status(run_dir)) or step(*a))
    inherit(base, "raised", train={"num_steps": 3, "changed_config": "allow"})
    assert set(seen) == {"running"}
    assert status(run_dir) == "finished"
    with dying(monkeypatch, engine.StudentEngine, "step"):
        inherit(base, "raised", train={"num_steps": 4, "changed_config": "allow"})
    assert status(run_dir) == "running"


def test_a_run_past_its_stopping_step_says_where_it_is(base, capsys):
    run_dir = inherit(base, "past", train={"stop_at_step": 4})
    before = (run_dir / "metrics.jsonl").read_bytes()
    for stop in (2, 4):
        capsys.readouterr()
        inherit(base, "past", train={"stop_at_step": stop})
        said = capsys.readouterr().out
        assert f"{run_dir} is at step 4 already, train.stop_at_step={stop}: nothing was done" in said
        assert "as asked" not in said
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert status(run_dir) == "running"


# --- what a first start leaves ---


def test_a_refused_first_start_on_a_read_only_corpus_blocks_no_other(base, tmp_path):
    corpus = shutil.copytree(base / "corpus", tmp_path / "corpus", ignore=shutil.ignore_patterns(".ki_ds_index"))
    for folder in (corpus, *(path for path in corpus.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    run_dir = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(UserError, match="exceeds the student's 32 positions"):
            run(run_dir, corpus, data={"seq_len": 64})
    assert (run_dir / "index").is_dir()
    assert not (run_dir / "config.yaml").exists()
    own = {"index_dir": str(run_dir / "cache" / "places")}
    with pytest.raises(UserError, match="exceeds the student's 32 positions"):
        run(run_dir, corpus, data={"seq_len": 64, **own})
    for name in ("monitor/csv/train_loss.csv", "config.yaml.tmp"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("step,lo")
    run(run_dir, corpus, data=own, train={"num_steps": 1}, monitor={"csv": True})
    assert status(run_dir) == "finished"


def test_a_start_that_died_before_its_first_checkpoint_blocks_no_other(base, monkeypatch):
    """It leaves configuration, manifest, metrics and best weights of step 0, which nobody would go on from."""
    run_dir = base / "died"
    with dying(monkeypatch, checkpoint, "begin"):
        run(run_dir, base / "corpus", train={"eval_every": 100})
    assert [r["step"] for r in records(run_dir, "valid")] == [0]
    run(run_dir, base / "corpus", optim={"lr": 1e-3}, seed=2)  # another configuration
    assert [r["step"] for r in records(run_dir, "valid")] == [0, 3, 6]
    assert [r["step"] for r in records(run_dir, "train")] == [1, 2, 3, 4, 5, 6]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["lr"] == 1e-3


def test_best_weights_without_a_checkpoint_are_not_lost_to_another_configuration(base, monkeypatch):
    with dying(monkeypatch, checkpoint, "begin"):
        run(base / "measured", base / "corpus", train={"save_every": 4})
    with pytest.raises(UserError, match=r"holds a run with optim.lr=0.003"):
        run(base / "measured", base / "corpus", optim={"lr": 1e-3})
