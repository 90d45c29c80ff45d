import dataclasses
import json
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ki_ds.checkpoints import lineage
from ki_ds.config import TeacherConfig, TeacherEntry
from ki_ds.data.batches import Sample, collate
from ki_ds.data.tokenize import tokenizer_hash, train_tokenizer
from ki_ds.errors import UserError
from ki_ds.models.presets import Rows, count_parameters
from ki_ds.teachers.factory import identify_teachers, make_teacher, make_teachers
from ki_ds.teachers.online import OnlineTeacher
from tests.teachers.cache_cases import cache_of, config_of, data_of

CPU = torch.device("cpu")
NUM_CLASSES = 261
NUM_POSITIONS = 24


def tiny_gpt(vocab_size=320, seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=NUM_POSITIONS, n_embd=16, n_layer=1, n_head=2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = [["the cat sees a dog in the garden"]] * 3
    return train_tokenizer(documents, NUM_CLASSES, out_dir=tmp_path_factory.mktemp("factory") / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A Hugging Face folder: weights and tokenizer."""
    path = tmp_path_factory.mktemp("factory") / "teacher"
    tiny_gpt().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def make(tokenizer):
    """make_teacher for a corpus of that tokenizer; keyword arguments change one thing."""

    def make(path, dtype="auto", task="causal", seq_len=NUM_POSITIONS, **changed):
        facts = {"tokenizer_sha256": tokenizer_hash(tokenizer), "num_classes": NUM_CLASSES} | changed
        return make_teacher(TeacherConfig(path=str(path), dtype=dtype), Rows(task, seq_len), **facts, device=CPU)

    return make


def row():
    ids = torch.arange(5, 13).numpy()
    return collate([Sample(0, ids, ids[:3] - 5, ids[:3])], pad_id=1, seq_len=NUM_POSITIONS)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_weights_are_of_the_dtype_asked_for(folder, make, name, dtype):
    teacher, _ = make(folder, name)
    signal = teacher.signal(row())
    assert (signal.hidden_ND.dtype, signal.weight_VD.dtype) == (dtype, dtype)
    reference = tiny_gpt().eval()
    with torch.no_grad():
        expected = reference(input_ids=row().input_ids_BL).logits[0, :3]
    found = torch.nn.functional.linear(signal.hidden_ND.float(), signal.weight_VD.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_facts_identify_the_teacher(folder, make, tmp_path):
    teacher, facts = make(folder)
    assert isinstance(teacher, OnlineTeacher)
    assert facts.path == str(folder)
    assert facts.tokenizer_checked
    expected = count_parameters(tiny_gpt())
    assert {name: getattr(facts, name) for name in expected} == expected
    assert json.loads(json.dumps(dataclasses.asdict(facts))) == dataclasses.asdict(facts)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert make(moved)[1].weights_sha256 == facts.weights_sha256
    tiny_gpt(seed=1).save_pretrained(moved)
    assert make(moved)[1].weights_sha256 != facts.weights_sha256
    assert len(facts.weights_sha256) == 64


def test_a_run_a_checkpoint_and_a_plain_folder_all_teach_alike(folder, make, tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000004"
    shutil.copytree(folder, run / "best")
    shutil.copytree(folder, checkpoint / "hf")
    (run / "run.json").write_text("{}")
    (checkpoint / "state.json").write_text("{}")
    signals = []
    for path in (folder, run, checkpoint):
        teacher, facts = make(path)
        assert facts.path == str(path)  # as the user named it
        assert facts.weights_sha256 == make(folder)[1].weights_sha256
        assert facts.tokenizer_checked
        signals.append(teacher.signal(row()).hidden_ND)
    assert all(torch.equal(signal, signals[0]) for signal in signals)


def test_a_run_without_weights_yet(make, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is a run without weights yet"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokenizer_sha256": "0" * 64}, r"teacher.path=.* has another tokenizer \([0-9a-f]{12}\) than data.corpus"),
        ({"num_classes": 321}, "has 320 output classes for the tokenizer's 321 ids"),
        ({"seq_len": NUM_POSITIONS + 1}, "data.seq_len=25 exceeds the teacher's 24 positions"),
        ({"task": "mlm"}, "teacher.path="),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(folder, make, changed, words):
    with pytest.raises(UserError, match=words) as caught:
        make(folder, **changed)
    assert "\n" not in str(caught.value)


def test_padding_is_allowed_but_not_another_vocabulary(make, tmp_path):
    for size, fits in ((NUM_CLASSES + 1024, True), (NUM_CLASSES + 1025, False)):
        tiny_gpt(size).save_pretrained(tmp_path / str(size))
        if fits:
            make(tmp_path / str(size))
        else:
            with pytest.raises(UserError, match="has 1286 output classes, too many for the tokenizer's 261 ids"):
                make(tmp_path / str(size))


def test_a_teacher_without_tokenizer_is_not_called_checked(make, tmp_path):
    tiny_gpt().save_pretrained(tmp_path)
    assert make(tmp_path)[1].tokenizer_checked is False


@pytest.mark.parametrize("damage", ["missing", "no config", "no weights", "cut weights"])
def test_a_folder_that_cannot_be_read_is_one_line_that_names_it(folder, make, tmp_path, damage):
    broken = shutil.copytree(folder, tmp_path / "broken")
    match damage:
        case "missing":
            shutil.rmtree(broken)
        case "no config":
            (broken / "config.json").unlink()
        case "no weights":
            (broken / "model.safetensors").unlink()
        case "cut weights":
            weights = (broken / "model.safetensors").read_bytes()
            (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="broken") as caught:
        make(broken)
    assert "\n" not in str(caught.value)
    assert "teacher.path" in str(caught.value)


def test_a_teacher_is_known_without_being_loaded_wherever_it_runs(base, tmp_path, monkeypatch):
    """What a run compares when it goes on is the same for each placement, loaded or not."""
    online = config_of(base)
    _, facts = make_teachers(online, data_of(online), device=CPU)
    expected = [dataclasses.asdict(found) for found in facts]
    cache_of(online, tmp_path / "cache", kind="hidden")
    monkeypatch.setattr("ki_ds.teachers.factory.load_lm", None)
    places = [{"placement": place} for place in ("online", "overlap", "ranks")]
    for teacher in (*places, {"placement": "cache", "path": str(tmp_path / "cache")}):
        found = identify_teachers(config_of(base, teacher=teacher))
        assert lineage.identities(found) == lineage.identities(expected)
        assert [(known["path"], known["name"]) for known in found] == [(expected[0]["path"], None)]
        assert (found[0]["cache"] is not None) == (teacher["placement"] == "cache")


def test_of_several_teachers_each_is_known_with_its_share(base):
    entries = [{"path": str(base / "mlm_teacher"), "share": share} for share in (1.0, 3.0)]
    several = config_of(base)
    several = dataclasses.replace(
        several,
        teacher=dataclasses.replace(several.teacher, path=None),
        teachers=[TeacherEntry(**entry) for entry in entries],
    )
    _, facts = make_teachers(several, data_of(several), device=CPU)
    found = identify_teachers(several)
    assert lineage.identities(found) == lineage.identities([dataclasses.asdict(each) for each in facts])
    assert [known["share"] for known in found] == [1.0, 3.0]
    missing = dataclasses.replace(several, teachers=[several.teachers[0], TeacherEntry(str(base / "nobody"))])
    with pytest.raises(UserError, match=r"teachers\.1\.path=.*nobody cannot be read"):
        identify_teachers(missing)
