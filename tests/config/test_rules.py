"""What may change when a run goes on; the list of several teachers, and what a change of it means."""

import re

import pytest
import yaml

from ki_ds import config as configuration
from ki_ds.config import TeacherEntry, check_entries, is_operational
from ki_ds.errors import UserError
from tests.tiny import ROOT

BASE = ["--run_dir", "runs/x", "--data.sources", "[{path: data/wb}, {path: data/cs, domain: CS}]"]
TAUGHT = [*BASE, "--inherit.schedule", "constant"]


def parse(teachers, *arguments):
    return configuration.parse([*TAUGHT, "--teachers", yaml.safe_dump(teachers, default_flow_style=True), *arguments])


def test_rows_by_domain_or_an_average():
    routed = parse([{"path": "t1", "domains": ["wb"]}, {"path": "t2", "domains": ["CS"]}])
    assert routed.all_teachers == [TeacherEntry("t1", ["wb"]), TeacherEntry("t2", ["CS"])]
    averaged = parse([{"path": "t1", "share": 3}, {"path": "t2"}])
    assert [entry.share for entry in averaged.all_teachers] == [3.0, None]
    check_entries([TeacherEntry("t1", ["a", "b"])], ["a", "b", "c"])  # c learns alone


def test_one_teacher_or_nobody_are_lists_too():
    alone = configuration.parse([*TAUGHT, "--teacher.path", "t1"])
    assert alone.all_teachers == [TeacherEntry("t1")]
    assert configuration.parse(BASE).all_teachers == []


def test_the_list_is_saved_and_compared_entry_by_entry(tmp_path):
    run = parse([{"path": "t1", "domains": ["wb"]}, {"path": "t2", "domains": ["CS"]}])
    configuration.save(run, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == run
    moved = parse([{"path": "elsewhere/t1", "domains": ["wb"]}, {"path": "t2", "domains": ["CS"]}])
    assert configuration.differences(run, moved) == {}  # their weights are compared by hash
    other = parse([{"path": "t1", "domains": ["CS"]}, {"path": "t2", "domains": ["wb"]}])
    assert configuration.differences(run, other) == {
        "teachers.0.domains": (["wb"], ["CS"]),
        "teachers.1.domains": (["CS"], ["wb"]),
    }
    average = parse([{"path": "t1", "share": 2}, {"path": "t2"}])
    assert configuration.differences(average, parse([{"path": "t1", "share": 3}, {"path": "t2"}])).keys() == {
        "teachers.0.share"
    }


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ([], ["teachers is empty"]),
        ([{"path": "t1", "domains": ["wb"]}, {"path": "t2"}], ["teachers.0 has domains, teachers.1 has none"]),
        ([{"path": "t1"}, {"path": "t2", "domains": ["wb"]}], ["teachers.0 has no domains, teachers.1 has some"]),
        ([{"path": "t1", "domains": ["cs"]}], ["teachers.0.domains names cs", "take of wb, CS"]),
        ([{"path": "t1", "domains": []}], ["teachers.0.domains is empty"]),
        (
            [{"path": "t1", "domains": ["wb"]}, {"path": "t2", "domains": ["CS", "wb"]}],
            ["wb", "teachers.0 and teachers.1"],
        ),
        ([{"path": "t1", "domains": ["wb", "wb"]}], ["wb is given to teachers.0 and teachers.0"]),
        ([{"path": "t1", "domains": ["wb"], "share": 1}], ["teachers.0.share=1 has no meaning", "domains"]),
        ([{"path": "t1", "share": 1}], ["teachers.0.share=1 has no meaning", "only one"]),
        ([{"path": "t1"}, {"path": "t2", "share": 0}], ["teachers.1.share=0 is not positive"]),
        ([{"path": "t1"}, {"path": "t2", "share": float("nan")}], ["teachers.1.share=nan is not positive"]),
        ([{"path": "t1"}, {"path": "t2", "share": float("inf")}], ["teachers.1.share=inf is not positive"]),
        ([{"path": ""}], ["teachers.0.path is empty"]),
        ([{"pth": "t1"}], ["teachers", "pth"]),
        ([{"path": "t1", "domains": "wb"}], ["teachers", "domains"]),
    ],
)
def test_a_list_that_makes_no_sense_is_one_line(teachers, words):
    with pytest.raises(UserError) as caught:
        parse(teachers)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_list_beside_other_fields():
    one = [{"path": "t1"}]
    with pytest.raises(UserError, match=r"teacher.path=t and teachers are both given"):
        parse(one, "--teacher.path", "t")
    with pytest.raises(UserError, match=r"teachers.0.path=t1 would never be used with inherit.schedule=none"):
        configuration.parse([*BASE, "--teachers", "[{path: t1}]"])
    parse(one, "--teacher.placement", "ranks", "--teacher.num_ranks", "2")


def test_the_documented_example_is_a_configuration(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/teachers.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "run.yaml").write_text(example)
    run = configuration.parse(["--config", str(tmp_path / "run.yaml"), "--run_dir", "runs/x"])
    assert [(entry.path, entry.domains) for entry in run.all_teachers] == [
        ("runs/medium_cs", ["CS"]),
        ("runs/medium_bio", ["BIO"]),
    ]


@pytest.mark.parametrize(
    "name", ["run_dir", "teacher.path", "data.sources.3.path", "teachers.0.path", "train.log_every"]
)
def test_how_a_run_is_carried_out_may_change(name):
    assert is_operational(name)


@pytest.mark.parametrize(
    "name", ["seed", "optim.lr", "data.sources.0.weight", "teacher.topk", "train.num_steps", "train.spike_sigmas"]
)
def test_what_it_computes_may_not(name):
    assert not is_operational(name)
