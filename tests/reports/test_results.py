"""What reading a run folder takes and refuses; what is known of ancestors and teachers."""

import json
import math
import shutil

import pytest

from ki_ds.errors import UserError
from ki_ds.reports.results import read_run, with_titles
from tests.fake_runs import MASKS, metric_records, points, teacher_record, write_lineage, write_run


def test_steps_done_again_after_a_resume_count_once(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100, 80, 70])
    again = list(metric_records(points([400, 99, 79])))[1:]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in again))
    run = read_run(folder)
    assert [point.ppl for point in run.curve] == [400, 99, 79]  # 300 belongs to the part that was thrown away
    assert [record["step"] for record in run.training] == [100, 200]


def test_other_kinds_of_metric_records_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100])
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "teacher_freed", "step": 40}) + "\n")
    assert len(read_run(folder).curve) == 2


def test_bad_run_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"run.json cannot be read"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "running", [400, 100], status="running")
    with pytest.raises(UserError, match=r"is not finished.*--allow_unfinished"):
        read_run(folder)
    assert read_run(folder, allow_unfinished=True).manifest["status"] == "running"
    (folder / "config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(UserError, match="is not YAML"):
        read_run(folder, allow_unfinished=True)
    (folder / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        read_run(folder)
    (folder / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="lacks task, status"):
        read_run(folder)


def test_broken_metrics_name_file_and_line(tmp_path):
    folder = write_run(tmp_path / "run", [400, 100])
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(text + '{"kind": "tr', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 4 is not a record"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no validation yet"):
        read_run(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "weights_sha256": "x"}'])
def test_a_broken_lineage_is_one_line(tmp_path, content):
    folder = write_run(tmp_path / "run", [400, 100], teacher=teacher_record())
    (folder / "best" / "lineage.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"lineage\.json is no record") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_costs_of_ancestors(tmp_path):
    """Of all generations before, each once; none of a run that began from nothing; not known without a record."""
    first = teacher_record(flops=1e8)
    facts = {"path": "t", "weights_sha256": "c" * 64, "num_parameters": 1, "lineage": first}
    second = teacher_record(flops=3e8, weights="e" * 64, teachers=[facts], started_from=facts)
    ends = {
        name: read_run(write_run(tmp_path / name, [400, 100], **teacher)).curve[-1].costs
        for name, teacher in {
            "alone": {},
            "one": {"teacher": first},
            "two": {"teacher": second},
            "hub": {"teacher": teacher_record(teachers=[facts | {"lineage": None}])},
            "lost": {"inherits": True},
            "adapted": {"config": {"model": {"init": "pretrained"}}},
        }.items()
    }
    before = {name: costs.flops_with_ancestors - costs.flops_with_teacher for name, costs in ends.items()}
    assert before["alone"] == 0
    assert before["one"] == pytest.approx(1e8)
    assert before["two"] == pytest.approx(4e8)
    assert all(math.isnan(before[name]) for name in ("hub", "lost", "adapted"))


def test_the_record_of_the_latest_weights_counts(tmp_path):
    """The best weights may be from before a second teacher came."""
    folder = write_run(tmp_path / "run", [400, 100, 200], teacher=teacher_record())
    teachers = [{"path": "t", "weights_sha256": "e" * 64, "num_parameters": 1, "lineage": teacher_record(flops=7e8)}]
    shutil.rmtree(folder / "best")
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_lineage(folder / "best", manifest, points([400, 100])[-1])
    last = folder / "checkpoints" / "step_00000200" / "hf"
    write_lineage(last, manifest | {"teachers": teachers}, points([400, 100, 200])[-1])
    run = read_run(folder)
    assert run.lineage["step"] == 200
    assert run.curve[0].costs.flops_with_ancestors == pytest.approx(7e8)


def test_the_gap_to_a_teacher_measured_on_the_same_rows(tmp_path):
    run = read_run(write_run(tmp_path / "run", [400, 43, 21.5], teacher=teacher_record(ppl=21.5)))
    assert run.teacher_ppl == 21.5
    assert [step for step, _ in run.teacher_gaps] == [0, 100, 200]
    assert [gap for _, gap in run.teacher_gaps][1:] == pytest.approx([math.log(2), 0])


@pytest.mark.parametrize(
    "other",
    [
        {"valid_masks": MASKS | {"variants": 3}},
        {"valid_masks": None},
        {"valid_domains": ["cs"]},
        {"task": "mlm"},
        {"data": {"train_sha256": "a" * 64, "valid_sha256": "0" * 64, "tokenizer_sha256": "d" * 64}},
    ],
)
def test_no_gap_to_a_teacher_measured_otherwise(tmp_path, other):
    run = read_run(write_run(tmp_path / "run", [400, 43, 21.5], teacher=teacher_record() | other))
    assert run.teacher_ppl is None
    assert run.teacher_gaps == []


def test_a_teacher_of_other_training_data_may_be_compared(tmp_path):
    data = {"train_sha256": "0" * 64, "valid_sha256": "b" * 64, "tokenizer_sha256": "d" * 64}
    run = read_run(write_run(tmp_path / "run", [400, 43], teacher=teacher_record(data=data)))
    assert run.teacher_ppl == 21.5


def test_runs_of_equal_names_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    folders = [tmp_path / "a" / "self", tmp_path / "b" / "self", tmp_path / "b" / "ki"]
    runs = with_titles([read_run(write_run(folder, [400, 100])) for folder in folders])
    assert [run.title for run in runs] == ["a/self", "b/self", "ki"]


def test_perplexity_of_all_domains_together(tmp_path):
    domains = {"wb": [400, 100, 25], "cs": [400, 100, 100]}
    run = read_run(write_run(tmp_path / "run", [400, 100, 100], domains=domains, valid_domains=["cs"]))
    assert run.measured_domains == {"cs"}
    assert run.curve[-1].domains == {"wb": 25, "cs": 100}
    assert [point.ppl for point in run.measured_on_all_domains().curve] == pytest.approx([400, 100, 50])
