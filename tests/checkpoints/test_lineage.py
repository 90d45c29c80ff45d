"""Lineage: three generations told by the last one, every ancestor's cost once, weights that were changed refused."""

import json
import shutil
import sys

import pytest
from rich.console import Console

from ki_ds.checkpoints import lineage
from ki_ds.errors import UserError
from ki_ds.models.presets import weights_sha256
from tests import forked
from tests.tiny import ROOT, environment, inherit, records, run


@pytest.fixture(scope="module")
def generations(base):
    """G1 is the base's teacher; G2 inherits from it, G3 from G2."""
    second = inherit(base, "lineage_g2")
    third = inherit(base, "lineage_g3", teacher={"path": str(second)})
    return base / "mlm_teacher", second, third


def read(run_dir):
    return json.loads((run_dir / "best" / lineage.FILE_NAME).read_text())


def test_the_last_generation_knows_all_before_it(generations):
    first, second, third = generations
    record = read(third)
    (parent,) = record["teachers"]
    (grandparent,) = parent["lineage"]["teachers"]
    assert parent["lineage"] == read(second)
    assert grandparent["lineage"] == read(first)
    assert grandparent["lineage"]["teachers"] == []
    assert record["weights_sha256"] == weights_sha256(str(third / "best"))
    assert record["inherit"] == {"schedule": "linear", "steps": 4, "tau": 2.0}
    at_best = next(r for r in records(third, "valid") if r["step"] == record["step"])
    assert record["valid_ppl"] == at_best["ppl"]
    assert (record["student_flops"], record["teacher_flops"]) == (at_best["student_flops"], at_best["teacher_flops"])


def test_costs_add_up_and_an_ancestor_counts_once(generations):
    first, second, third = map(read, generations)
    spent = lineage.costs(third)
    assert spent.own == third["student_flops"]
    assert spent.teachers == third["teacher_flops"] > 0
    before = [record["student_flops"] + record["teacher_flops"] for record in (first, second)]
    assert spent.ancestors == pytest.approx(sum(before))
    assert spent.cumulative == pytest.approx(spent.own + spent.teachers + sum(before))
    # G1 teaches G3 as well as G2
    again = {"path": "g1", "weights_sha256": first["weights_sha256"], "num_parameters": 1, "lineage": first}
    both = {**third, "teachers": [*third["teachers"], again]}
    assert lineage.costs(both).ancestors == spent.ancestors


def test_the_tool_prints_the_tree(generations):
    command = [sys.executable, "tools/lineage.py", str(generations[2])]
    done = forked.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    indents = [len(line) - len(line.lstrip("│├└─ ")) for line in lines if "parameters)" in line]
    names = [name for line in lines for name in ("lineage_g3", "lineage_g2", "mlm_teacher") if name in line]
    assert names == ["lineage_g3", "lineage_g2", "mlm_teacher"]
    assert indents == sorted(indents)
    assert len(set(indents)) == 3
    assert "T_inherit 4, tau 2" in done.stdout
    as_json = forked.run([*command, "--json"], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert json.loads(as_json.stdout) == read(generations[2])


def test_a_change_of_teachers_is_remembered(base, generations):
    other = inherit(base, "lineage_other", model={"hidden_size": 16})
    name, settings = "lineage_switched", {"inherit": {"schedule": "constant"}}
    inherit(base, name, **settings, train={"stop_at_step": 3})
    teacher = {"path": str(other)}
    folder = inherit(base, name, **settings, teacher=teacher, train={"changed_config": "allow"})
    record = json.loads((folder / "checkpoints/step_00000006/hf" / lineage.FILE_NAME).read_text())
    assert [t["lineage"]["name"] for t in record["teachers"]] == ["mlm_teacher", "lineage_other"]
    assert record["step"] == 6


def test_from_one_teacher_to_none_to_another_without_a_reset(base, generations):
    """The optimizer, the data and the learning rate go on; only who teaches changes."""
    other = inherit(base, "lineage_second_teacher", model={"hidden_size": 16})
    name, allow = "lineage_in_turn", {"changed_config": "allow"}
    train = {"num_steps": 10, "save_every": 10}
    first = {"schedule": "linear", "steps": 2}
    inherit(base, name, inherit=first, train={**train, "stop_at_step": 5})
    second = {"schedule": "heaviside", "steps": 3, "start_step": 6}
    folder = inherit(base, name, inherit=second, teacher={"path": str(other)}, train={**train, **allow})
    steps = records(folder, "train")
    assert [r["alpha"] for r in steps] == [1.0, 0.5, 0, 0, 0, 0, 1.0, 1.0, 1.0, 0]
    assert [r["kl"] > 0 for r in steps] == [r["alpha"] > 0 for r in steps]
    alone = run(base / "lineage_alone", base / "corpus", train=train)
    rates = [[r["lr"], r["tokens"]] for r in steps]
    assert rates == [[r["lr"], r["tokens"]] for r in records(alone, "train")]
    record = json.loads((folder / "checkpoints/step_00000010/hf" / lineage.FILE_NAME).read_text())
    assert [t["lineage"]["name"] for t in record["teachers"]] == ["mlm_teacher", "lineage_second_teacher"]


def test_a_start_from_trained_weights_is_an_ancestor(base, generations):
    first = generations[0]
    model = {"name": str(first), "init": "pretrained"}
    none = dict.fromkeys(("num_layers", "hidden_size", "num_heads", "ffn_size"))
    folder = run(base / "lineage_adapted", base / "corpus", model={**model, **none, "num_positions": 512})
    record = read(folder)
    assert record["started_from"]["lineage"] == read(first)
    assert lineage.costs(record).ancestors == read(first)["student_flops"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(lineage.tree(record))
    assert "started from mlm_teacher" in captured.get()


def test_weights_that_were_changed_are_no_teacher(base, generations, tmp_path):
    shutil.copytree(generations[1], tmp_path / "g2")
    path = tmp_path / "g2/best/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"lineage\.json says .*; they were changed"):
        inherit(base, "lineage_refused", teacher={"path": str(tmp_path / "g2")})


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"version": 9, "weights_sha256": "x"}'])
def test_a_broken_record_is_one_line(tmp_path, content):
    (tmp_path / lineage.FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=r"lineage\.json (is no record|has version 9)"):
        lineage.read(tmp_path, "x")
    assert lineage.read(tmp_path / "nowhere", "x") is None


def test_the_tree_says_what_each_of_several_teachers_was_for(generations):
    parent = read(generations[2])["teachers"][0]
    teachers = [
        parent | {"domains": ["wb", "cs"]},
        parent | {"share": 0.5},
        parent | {"lineage": None, "domains": ["bio"]},
    ]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(lineage.tree(read(generations[2]) | {"teachers": teachers}))
    for words in ("taught (wb, cs) by lineage_g2", "taught (share 0.5) by lineage_g2", "taught (bio) by"):
        assert words in captured.get()


def test_a_manifest_of_before_had_one_teacher_at_most():
    assert lineage.teachers_of({"teachers": [{"path": "a"}, {"path": "b"}]}) == [{"path": "a"}, {"path": "b"}]
    assert lineage.teachers_of({"teacher": {"path": "a"}}) == [{"path": "a"}]
    assert lineage.teachers_of({"teacher": None}) == []
