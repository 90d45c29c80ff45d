import json
from pathlib import Path

import pytest

from ki_ds import chain, demo
from ki_ds.config import flatten, inherit_steps, parse
from ki_ds.demo import demo_folder, demo_jobs, run_demo

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

    def run_group(command, _environment):
        run_dir = Path(command[command.index("--run_dir") + 1])
        run_dir.mkdir(parents=True)
        (run_dir / "run.json").write_text(json.dumps({"status": "finished"}))
        seen.append(f"train {run_dir}")
        return 0, None

    def write_report(specs, out, **_):
        seen.append(f"report {' '.join(map(str, specs))} -> {out}")

    monkeypatch.setattr(demo, "build_store", build_store)
    monkeypatch.setattr(chain, "run_group", run_group)
    monkeypatch.setattr(demo, "write_report", write_report)
    monkeypatch.setattr(demo, "text_table", lambda comparison: "the table")
    return seen


def test_the_demo_goes_through_its_stages_and_trains_nothing_twice(stages, capsys):
    runs = [f"train runs/demo_mlm/{name}" for name in ("teacher", "self", "inherit")]
    corpus = "corpus runs/demo_mlm/corpus"  # build_store itself finds its work done
    report = "report runs/demo_mlm/self runs/demo_mlm/inherit -> runs/demo_mlm/report.html"
    run_demo("mlm")
    assert stages == [corpus, *runs, report]
    said = capsys.readouterr().out
    places = [said.index(f"[{number}/5]") for number in range(1, 6)]
    assert places == sorted(places)
    assert "the table" in said
    assert "minutes" in said
    stages.clear()
    run_demo("mlm")
    assert stages == [corpus, report]
    assert capsys.readouterr().out.count("finished before") == 3


def test_an_interrupted_demo_goes_on_where_it_was(stages, monkeypatch):
    complete = chain.run_group

    def fails_in_the_last(command, environment):
        return (1, None) if "runs/demo_mlm/inherit" in command else complete(command, environment)

    monkeypatch.setattr(chain, "run_group", fails_in_the_last)
    with pytest.raises(ValueError, match="inherit stopped with exit code 1"):
        run_demo("mlm")
    assert stages[-1] == "train runs/demo_mlm/self"  # no report of a demo that is not done
    stages.clear()
    monkeypatch.setattr(chain, "run_group", complete)
    run_demo("mlm")
    assert [stage.split()[0] for stage in stages] == ["corpus", "train", "report"]
