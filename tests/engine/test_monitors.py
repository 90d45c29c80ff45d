"""Monitors of a run that goes on: every step once, one header, one run of W&B, for other tools to read."""

import sys
from types import SimpleNamespace

import pandas
import pytest

from ki_ds.config import MonitorConfig
from ki_ds.engine.monitors import open_monitors
from ki_ds.engine.student import engine_monitors
from ki_ds.errors import UserError
from tests.tiny import inherit, records


def master():
    """What a DeepSpeed engine has without monitors."""
    return SimpleNamespace(enabled=False, tb_monitor=None, csv_monitor=None, wandb_monitor=None)


def write_csv(folder, samples, steps):
    opened = master()
    open_monitors(opened, MonitorConfig(csv=True), folder, samples=samples)
    assert opened.enabled
    for step in steps:
        opened.csv_monitor.write_events([("train/loss", step / 2, step), ("valid/corpus/ppl", step * 3.0, step)])


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    from deepspeed import comm

    monkeypatch.setattr(comm, "get_rank", lambda *_, **__: 0)


# --- CSV ---


def test_csv_files_have_one_header_and_every_step_once(tmp_path):
    write_csv(tmp_path, 0, [8, 16, 24, 32])
    write_csv(tmp_path, 16, [24, 32, 40])
    for name, column, factor in (("train_loss", "loss", 0.5), ("valid_corpus_ppl", "ppl", 3.0)):
        table = pandas.read_csv(tmp_path / "csv" / f"{name}.csv")
        assert list(table.columns) == ["step", column]
        assert table["step"].tolist() == [8, 16, 24, 32, 40]
        assert table[column].tolist() == [factor * step for step in table["step"]]


def test_a_start_from_nothing_begins_them_anew(tmp_path):
    write_csv(tmp_path, 0, [0, 8, 16])
    write_csv(tmp_path, 0, [0, 8])
    assert pandas.read_csv(tmp_path / "csv" / "train_loss.csv")["step"].tolist() == [0, 8]


def test_csv_files_of_earlier_versions_are_put_in_order(tmp_path):
    (tmp_path / "csv").mkdir()
    path = tmp_path / "csv" / "train_loss.csv"
    path.write_text("step,loss\n8,1.0\n16,2.0\nstep,loss\n16,3.0\n24,4.0\n32,5")
    path.with_name("train_ce.csv").write_text("st")
    write_csv(tmp_path, 24, [32])
    assert path.read_text().splitlines() == ["step,loss", "8,1.0", "16,3.0", "24,4.0", "32,16.0"]
    assert not path.with_name("train_ce.csv").exists()


# --- Weights & Biases ---


def test_a_run_of_wandb_goes_on(tmp_path, monkeypatch):
    made, logged, wandb = [], [], SimpleNamespace()
    wandb.init = lambda **given: made.append(given)
    wandb.log = lambda data, step, commit: logged.append((data, step))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for folder in ("a", "a", "b"):
        opened = master()
        open_monitors(opened, MonitorConfig(wandb_project="p"), tmp_path / folder, samples=0)
        opened.wandb_monitor.write_events([("train/loss", 0.5, 8)])
    assert [given["project"] for given in made] == ["p"] * 3
    assert {given["resume"] for given in made} == {"allow"}
    assert made[0]["id"] == made[1]["id"] != made[2]["id"]
    assert logged == [({"train/loss": 0.5}, 8)] * 3
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    open_monitors(master(), MonitorConfig(wandb_project="p"), tmp_path / "c", samples=0)
    assert made[-1]["id"] == "mine"


# --- TensorBoard ---


def test_tensorboard_is_told_from_where_on_steps_are_done_again(tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, **given):
            made.append(given)

        def add_scalar(self, *event):
            made.append(event)

        def flush(self):
            made.append("flushed")

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for samples in (0, 16):
        opened = master()
        open_monitors(opened, MonitorConfig(tensorboard=True), tmp_path, samples=samples)
        opened.tb_monitor.write_events([("train/loss", 0.5, samples + 8)])
    folder = str(tmp_path / "tensorboard")
    assert made[::3] == [{"log_dir": folder, "purge_step": 0}, {"log_dir": folder, "purge_step": 17}]
    assert made[1::3] == [("train/loss", 0.5, 8), ("train/loss", 0.5, 24)]
    assert made[2::3] == ["flushed"] * 2


def test_tensorboard_itself_shows_every_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    for samples, steps in ((0, [0, 8, 16, 24, 32]), (16, [24, 32, 40])):
        opened = master()
        open_monitors(opened, MonitorConfig(tensorboard=True), tmp_path, samples=samples)
        for step in steps:
            opened.tb_monitor.write_events([("train/loss", samples + step, step)])
        opened.tb_monitor.summary_writer.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [
        *((step, step) for step in (0, 8, 16)),
        *((step, 16 + step) for step in (24, 32, 40)),
    ]


# --- in a run ---


def test_a_run_that_goes_on_has_the_steps_of_its_metrics(base):
    monitor, train = {"csv": True}, {"num_steps": 6, "save_every": 4}
    run_dir = inherit(base, "monitors", monitor=monitor, train={**train, "stop_at_step": 5})
    newest = run_dir / "checkpoints" / "step_00000005"
    newest.rename(run_dir / "away")  # as if it had been killed at step 5
    inherit(base, "monitors", monitor=monitor, train=train)
    for name in ("train_loss", "train_ce", "valid_ppl"):
        table = pandas.read_csv(run_dir / "monitor" / "csv" / f"{name}.csv")
        kind, figure = name.split("_")
        assert list(zip(table["step"], table[figure], strict=True)) == [
            pytest.approx((record["samples"], record[figure])) for record in records(run_dir, kind)
        ]
    assert pandas.read_csv(run_dir / "monitor" / "csv" / "train_loss.csv")["step"].tolist() == [8, 16, 24, 32, 40, 48]


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(engine_monitors.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"monitor.wandb_project needs the package wandb; pip install wandb"):
        engine_monitors.check_packages(MonitorConfig(wandb_project="p"))
