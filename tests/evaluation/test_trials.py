"""Finished fine-tunings are kept by all that they depend on; the others run, side by side where there is room."""

import dataclasses
import json
import os
import pickle

import pytest

from ki_ds.errors import UserError
from ki_ds.evaluation import trials as module
from ki_ds.evaluation.finetune import Candidate, Outcome
from ki_ds.evaluation.tasks import Settings
from ki_ds.evaluation.trials import Trial, run_trials
from tests.evaluation.data_sets import animals

DATA = animals(8)
SHA = DATA.sha256()
MODEL = Candidate("model", "folder", "folder", "architecture", "weights")
TRIAL = Trial(MODEL, "animals", SHA, Settings(1e-3, 8), 1)


def outcome(value):
    return Outcome({"valid": {"accuracy": value}}, 1, 2, 3.0, 0.0, 100)


@pytest.fixture
def done(monkeypatch):
    """Fine-tuning replaced by a note of what was asked."""
    asked = []

    def fine_tune(candidate, data, settings, *, seed, **_):
        asked.append((candidate.name, settings.lr, seed))
        if settings.lr == 666:
            raise UserError("cannot")
        return outcome(seed / 10)

    monkeypatch.setattr(module, "fine_tune", fine_tune)
    return asked


def run(trials, out, **options):
    return run_trials(trials, {SHA: DATA}, out, places=["cpu"], show_progress=False, **options)


def test_what_is_finished_is_not_repeated(tmp_path, done):
    some = [dataclasses.replace(TRIAL, seed=seed) for seed in (1, 2, 3)]
    first = run(some[:2], tmp_path)
    assert len(done) == 2
    assert run(some, tmp_path) == {**first, some[2]: outcome(0.3)}
    assert done == [("model", 1e-3, 1), ("model", 1e-3, 2), ("model", 1e-3, 3)]


def test_what_is_finished_stays_when_another_fails(tmp_path, done):
    failing = dataclasses.replace(TRIAL, settings=Settings(666, 8))
    with pytest.raises(UserError, match="cannot"):
        run([TRIAL, failing, dataclasses.replace(TRIAL, seed=2)], tmp_path)
    assert run([TRIAL], tmp_path) == {TRIAL: outcome(0.1)}
    assert [seed for _, lr, seed in done if lr != 666] == [1]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_result_depends_on_everything(tmp_path, done, monkeypatch):
    changed = [
        dataclasses.replace(TRIAL, seed=2),
        dataclasses.replace(TRIAL, data_sha256="other"),
        dataclasses.replace(TRIAL, candidate=dataclasses.replace(MODEL, weights="other")),
        dataclasses.replace(TRIAL, candidate=dataclasses.replace(MODEL, weights=None)),
        dataclasses.replace(TRIAL, candidate=dataclasses.replace(MODEL, architecture="other")),
    ]
    values = {"lr": 2e-3, "batch_size": 16, "epochs": 1, "warmup_ratio": 0.1, "weight_decay": 0.0, "max_length": 8}
    values |= {"max_train_samples": 4, "micro_batch_size": 2, "precision": "bf16"}
    assert values.keys() == Settings.__dataclass_fields__.keys()
    for name, value in values.items():
        changed.append(dataclasses.replace(TRIAL, settings=dataclasses.replace(TRIAL.settings, **{name: value})))
    assert len({TRIAL.key, *(trial.key for trial in changed)}) == len(changed) + 1
    renamed = dataclasses.replace(MODEL, name="other", folder="elsewhere", tokenizer="elsewhere")
    assert dataclasses.replace(TRIAL, candidate=renamed).key == TRIAL.key
    monkeypatch.setattr(module, "version", lambda name: "other")
    assert dataclasses.replace(TRIAL, candidate=renamed).key != TRIAL.key


@pytest.mark.parametrize("content", ["{", "{}", '{"outcome": {"x": 1}}'])
def test_a_damaged_result_is_one_line(tmp_path, done, content):
    run([TRIAL], tmp_path)
    (file,) = (tmp_path / "results").iterdir()
    assert json.loads(file.read_text())["seed"] == 1
    file.write_text(content)
    with pytest.raises(UserError, match=rf"{file.name} (cannot be read|is no result)"):
        run([TRIAL], tmp_path)


def test_several_processes(base, tmp_path):
    candidate = Candidate.find(str(base / "mlm_teacher"))
    settings = Settings(lr=1e-2, batch_size=8, epochs=1)
    some = [Trial(candidate, "animals", SHA, settings, seed) for seed in (1, 2)]
    alone = run(some, tmp_path / "alone")
    both = run_trials(some, {SHA: DATA}, tmp_path / "both", places=["cpu", "cpu"], show_progress=False)
    assert {t: o.scores for t, o in alone.items()} == {t: o.scores for t, o in both.items()}
    assert len(list((tmp_path / "both/results").iterdir())) == 2
    assert run(some, tmp_path / "both") == both
    error = UserError("one line")  # a worker's comes through a pipe
    assert str(pickle.loads(pickle.dumps(error))) == "one line"


def test_a_process_that_dies_is_one_line(tmp_path, monkeypatch):
    class Pool:
        _processes = None

        def __init__(self, *_args, **_settings):
            self.made = module.ProcessPoolExecutor

        def submit(self, *_args):
            raise module.BrokenProcessPool("killed")

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r"has ended .*call it again to go on"):
        run_trials([TRIAL, dataclasses.replace(TRIAL, seed=2)], {SHA: DATA}, tmp_path, places=["cpu", "cpu"])


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,6", "6")])
def test_a_process_sees_its_own_gpu_alone(monkeypatch, visible, expected):
    class Queue:
        def get(self):
            return "cuda:1"

    monkeypatch.setattr(module, "_HERE", {})
    monkeypatch.setenv("RANK", "3")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    module._take_place(Queue(), 2, {}, None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert module._HERE["kind"] == "cuda"
    assert "RANK" not in os.environ


def test_places(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    assert module.devices() == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 0)
    assert module.devices() == ["cpu"]
