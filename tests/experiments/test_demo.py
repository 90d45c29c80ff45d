from pathlib import Path

import pytest
import torch

from ki_ds.config import flatten, inherit_steps, parse
from ki_ds.errors import UserError
from ki_ds.experiments import demo
from ki_ds.experiments.demo import demo_folder, demo_jobs, run_demo

CASES = [(task, size, seed) for task in ("mlm", "causal") for size in ("full", "smoke") for seed in (1, 5)]


@pytest.mark.parametrize(("task", "size", "seed"), CASES)
def test_the_three_runs_are_valid_and_belong_together(task, size, seed):
    folder = demo_folder(task, size, seed)
    jobs = demo_jobs(task, size, seed)
    assert [job.name for job in jobs] == ["teacher", "self", "inherit"]
    teacher, alone, inheriting = runs = [parse(job.arguments()) for job in jobs]
    for job, run in zip(jobs, runs, strict=True):
        assert run.run_dir == str(job.run_dir) == str(folder / job.name)
        assert (run.task, run.seed, run.data.corpus) == (task, seed, str(folder / "corpus"))
        assert run.data == alone.data
        assert run.train.num_steps <= (12 if size == "smoke" else 5000)
    for run in (teacher, alone):
        assert (run.teacher.path, run.inherit.schedule) == (None, "none")
    assert inheriting.teacher.path == teacher.run_dir
    assert 0 < inherit_steps(inheriting) <= inheriting.train.num_steps


@pytest.mark.parametrize(("task", "size", "seed"), CASES)
def test_the_students_differ_in_nothing_but_their_teacher(task, size, seed):
    _, alone, inheriting = (flatten(parse(job.arguments())) for job in demo_jobs(task, size, seed))
    differing = {name for name in alone if alone[name] != inheriting[name]}
    assert differing - {"inherit.tau"} == {"run_dir", "teacher.path", "inherit.schedule", "inherit.steps"}


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_the_teacher_is_the_smaller_model(task):
    teacher, alone, _ = (parse(job.arguments()).model for job in demo_jobs(task, "full", 1))
    for name in ("num_layers", "hidden_size", "ffn_size"):
        assert getattr(teacher, name) < getattr(alone, name)


def test_every_demo_has_a_folder_of_its_own():
    assert demo_folder("mlm", "full", 1) == Path("runs/demo_mlm")
    assert demo_folder("causal", "smoke", 3) == Path("runs/demo_causal_smoke_seed3")
    assert len({demo_folder(*case) for case in CASES}) == len(CASES)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """The names of the demo's stages as they come, with nothing behind them but a finished run's folder."""
    seen: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "gensim_dump_path", lambda: tmp_path / "dump.xml.bz2")

    def build_store(sources, spec, out, **_):
        assert (sources, spec.vocab_size) == ([tmp_path / "dump.xml.bz2"], demo.VOCAB_SIZES["mlm"])
        seen.append(f"corpus {out}")

    def run_jobs(jobs, places):
        assert places[0].num_ranks == (torch.cuda.device_count() or 2)
        seen.extend(f"train {job.run_dir}" for job in jobs)

    def write_report(specs, out, **_):
        seen.append(f"report {' '.join(map(str, specs))} -> {out}")

    monkeypatch.setattr(demo, "build_store", build_store)
    monkeypatch.setattr(demo, "run_jobs", run_jobs)
    monkeypatch.setattr(demo, "write_report", write_report)
    monkeypatch.setattr(demo, "text_table", lambda comparison: "the table")
    return seen


def test_the_demo_goes_through_its_stages_and_reports_the_students(stages, capsys):
    runs = [f"train runs/demo_mlm/{name}" for name in ("teacher", "self", "inherit")]
    corpus = "corpus runs/demo_mlm/corpus"  # build_store itself finds its work done
    report = "report runs/demo_mlm/self runs/demo_mlm/inherit -> runs/demo_mlm/report.html"
    run_demo("mlm")
    assert stages == [corpus, *runs, report]
    said = capsys.readouterr().out
    places = [said.index(f"[{number}/3]") for number in range(1, 4)]
    assert places == sorted(places)
    assert "the table" in said
    assert "minutes" in said


def test_a_demo_that_is_not_done_has_no_report(stages, monkeypatch):
    def fail(*_):
        raise UserError("inherit ended with exit code 1")

    monkeypatch.setattr(demo, "run_jobs", fail)
    with pytest.raises(UserError, match="inherit ended"):
        run_demo("mlm")
    assert stages == ["corpus runs/demo_mlm/corpus"]
