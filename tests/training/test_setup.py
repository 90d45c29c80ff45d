"""What is refused before the first step: one line that names it, nothing half-written."""

import random
import shutil
from pathlib import Path

import pytest

from ki_ds import config as configuration
from ki_ds.checkpoints import lineage
from ki_ds.errors import UserError
from ki_ds.files import read_json
from ki_ds.teachers import factory
from tests.tiny import inherit, run, tiny_corpus


def refused(base, name, match, **groups):
    with pytest.raises(UserError, match=match):
        inherit(base, name, **groups)


def test_teacher_of_another_vocabulary(base):
    other = tiny_corpus(base / "other_corpus", vocab_size=300, seed=1)
    run(base / "other_teacher", other, train={"num_steps": 1})
    refused(base, "mixed", "has another tokenizer", teacher={"path": str(base / "other_teacher")})
    assert not (base / "mixed" / "checkpoints").exists()


def test_a_teacher_without_tokenizer_is_taken_by_its_size_and_that_is_said(base, capsys):
    folder = base / "bare_teacher"
    shutil.copytree(base / "mlm_teacher" / "best", folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    inherit(base, "bare", teacher={"path": str(folder)}, train={"num_steps": 1})
    assert "has no tokenizer" in capsys.readouterr().out


def test_a_causal_teacher_for_a_masked_student(base):
    refused(base, "crossed", "teacher.path=", teacher={"path": str(base / "causal_teacher")})


def test_missing_teacher_and_corpus(base):
    refused(base, "orphan", "teacher.path=.*cannot be read", teacher={"path": str(base / "nobody")})
    refused(base, "no_data", "is no prepared corpus", data={"corpus": str(base / "nothing")})


def test_a_teacher_that_nobody_asks_is_said_and_has_to_be_there_and_the_same(base, capsys):
    none = {"schedule": "constant", "constant_alpha": 0.0, "steps": None}
    refused(base, "silent", "teacher.path=.*cannot be read", teacher={"path": str(base / "nobody")}, inherit=none)
    inherit(base, "silent", inherit=none, train={"num_steps": 1})
    teacher = base / "mlm_teacher"
    assert capsys.readouterr().out.count(f"the teacher {teacher} is not asked: alpha is 0 from step 1 on") == 1
    assert read_json(base / "silent" / "run.json")["teachers"] == []

    inherit(base, "over", train={"stop_at_step": 5})  # taught for 4 steps
    refused(base, "over", "teacher.path=.*cannot be read", teacher={"path": str(base / "nobody")})
    other = run(base / "over_other", base / "corpus", model={"hidden_size": 16}, train={"num_steps": 1}, seed=2)
    refused(base, "over", "teacher.path=.*has other weights", teacher={"path": str(other)})
    capsys.readouterr()
    inherit(base, "over", teacher={"path": str(other)}, train={"changed_config": "allow"})
    assert f"the teacher {other} is not asked: alpha is 0 from step 6 on" in capsys.readouterr().out
    assert read_json(base / "over" / "run.json")["teachers"][0]["path"] == str(teacher)


def test_two_names_of_a_hub_are_two_teachers(base):
    """Their weights are in no folder, so that nothing else tells them apart."""
    one, other = ({"path": name, "weights_sha256": None, "name": None, "cache": None} for name in ("a/b", "c/d"))
    lineage.check_teachers(base, [one], [one])
    with pytest.raises(UserError, match=r"inherited from a/b, teacher\.path=c/d has other weights"):
        lineage.check_teachers(base, [one], [other])


READERS = {
    "run.json": lambda path: read_json(path, "data"),
    "best/valid.json": lambda path: factory._valid_ppl(str(path.parent)),
    "best/lineage.json": lambda path: lineage.read(path.parent, None),
    "checkpoints/step_00000008/state.json": lambda path: read_json(path),
    "config.yaml": lambda path: configuration.load(path),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_run_keeps_as_text_cut_at_any_byte_is_one_line(base, tmp_path, name):
    whole = (base / "mlm_teacher" / name).read_bytes()
    path = tmp_path / Path(name).name
    path.write_bytes(whole)
    READERS[name](path)
    yaml = path.suffix == ".yaml"  # of which a part can be whole: each value is compared with the run's
    taken, said = 0, []
    for cut in range(0, len(whole) - 1, 40 if yaml else 1):
        path.write_bytes(whole[:cut])
        try:
            READERS[name](path)
            taken += 1
        except UserError as error:
            said.append(str(error))
    assert not [line for line in said if "\n" in line]
    assert said
    assert yaml or not taken


def test_rows_longer_than_the_student_or_teacher(base):
    refused(base, "long", "seq_len=64 exceeds the student's 32 positions", data={"seq_len": 64})
    longer = {"data": {"seq_len": 64}, "model": {"num_positions": 64}}
    refused(base, "longer", "seq_len=64 exceeds the teacher's 32 positions", **longer)


def test_20_changes_of_data_or_tokenizer_under_a_run_are_refused(base, tmp_path, record_property):
    """Of tokens, of the index and of the tokenizer, a byte that flips or two tokens that change places."""
    corpus = shutil.copytree(base / "corpus", tmp_path / "corpus")
    run(tmp_path / "run", corpus, train={"stop_at_step": 2})
    edited = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file() and path.parent.name != "index"}
    draw, outcomes = random.Random(4), []
    files = sorted(path for path in edited if path.suffix in (".bin", ".idx") or path.name == "tokenizer.json")
    for number in range(20):
        path = files[number % len(files)]
        data = bytearray(edited[path])
        if number % 3 and path.suffix == ".bin":  # two tokens change places
            one, other = (2 * place for place in draw.sample(range(len(data) // 2), 2))
            data[one : one + 2], data[other : other + 2] = data[other : other + 2], data[one : one + 2]
        if bytes(data) == edited[path]:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            run(tmp_path / "run", corpus)
        assert "\n" not in str(caught.value)
        outcomes.append(str(caught.value))
        path.write_bytes(edited[path])
    run(tmp_path / "run", corpus)  # as it was, it goes on
    record_property("figure", f"{len(outcomes)}/20 changes refused")


def test_data_changed_under_a_run(base):
    corpus = tiny_corpus(base / "moving")
    run(base / "moved", corpus, train={"stop_at_step": 2})
    shutil.rmtree(corpus)
    tiny_corpus(base / "moving", seed=3)
    with pytest.raises(UserError, match="sha256 was"):
        run(base / "moved", corpus)


# --- what has moved ---


def test_validation_corpora_may_move_and_not_change(base, tmp_path):
    valid = shutil.copytree(base / "corpus", tmp_path / "valid")
    run(tmp_path / "run", base / "corpus", data={"valid": {"V": str(valid)}}, train={"stop_at_step": 2})
    moved = valid.rename(tmp_path / "elsewhere")
    run(tmp_path / "run", base / "corpus", data={"valid": {"V": str(moved)}}, train={"stop_at_step": 3})
    with pytest.raises(UserError, match=r"data.valid=\['V'\], now it is \['W'\]"):
        run(tmp_path / "run", base / "corpus", data={"valid": {"W": str(moved)}})
    other = tiny_corpus(tmp_path / "other", seed=5, tokenizer=base / "corpus" / "tokenizer")
    with pytest.raises(UserError, match="valid_sha256 was"):
        run(tmp_path / "run", base / "corpus", data={"valid": {"V": str(other)}})
