"""Answers from elsewhere: what is asked is written down; what comes back is a teacher, or refused by its line."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.teachers.answers import export_requests, record_answers
from ki_ds.teachers.cache_build import build_cache
from ki_ds.teachers.cache_files import Manifest
from tests.teachers.cache_cases import cache_of, config_of, data_of, questions_of, reading, teacher_of

K = 5


@pytest.fixture(scope="module")
def setting(base, tmp_path_factory):
    """(config, data, questions, requests, answers of the tiny teacher at temperature 1 as JSON objects)."""
    config = config_of(base, inherit={"schedule": "linear", "steps": 2})
    data = data_of(config)
    questions = questions_of(config, data)
    path = tmp_path_factory.mktemp("answers") / "requests.jsonl"
    assert export_requests(path, questions, data.vocabulary.tokenizer) == 16
    requests = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    teacher, _ = teacher_of(config, data)
    answers = []
    for request in requests:
        signal = teacher.signal(questions.one(request["mask"], request["sample_id"]))
        logits = torch.nn.functional.linear(signal.hidden_ND, signal.weight_VD, signal.bias_V)[:, :320]
        top = logits.log_softmax(-1).topk(K)
        rows = [
            {"ids": ids, "log_probs": values}
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        answers.append({"sample_id": request["sample_id"], "mask": request["mask"], "rows": rows})
    return config, data, questions, requests, answers


def record(setting, path, answers, **changed):
    """The answers written to a file and read as a recording."""
    _, data, questions, _, _ = setting
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8")
    given = {"topk": K, "answers_tau": 1.0, "num_parameters": 0, "tokenizer": data.vocabulary.tokenizer} | changed
    return record_answers(path, questions, **given)


def test_what_is_asked(setting):
    _, data, questions, requests, _ = setting
    assert [r["sample_id"] for r in requests] == np.concatenate([b[2] for b in questions.blocks()]).tolist()
    for request in requests:
        sample = questions.train.sample(request["sample_id"], seed=1, epoch=request["mask"])
        assert request["input_ids"] == sample.input_ids_T.tolist()
        assert request["positions"] == sample.positions_N.tolist()
        assert request["text"] == data.vocabulary.tokenizer.decode(sample.input_ids_T)
    assert any("<mask>" in request["text"] for request in requests)
    assert not any("labels" in request for request in requests)  # the answer is not given away


def test_text_is_left_out_without_a_tokenizer(setting, tmp_path):
    export_requests(tmp_path / "r.jsonl", setting[2], None)
    assert "text" not in json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_the_tiny_teacher_by_mail_is_the_tiny_teacher(setting, tmp_path):
    """Answers at temperature 1, in any order and form, give the renormalised signal of the teacher at the run's tau."""
    config, data, questions, requests, answers = setting
    vocabulary = {i: token for token, i in data.vocabulary.tokenizer.get_vocab().items()}
    forms = []
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        match number % 4:
            case 0:
                forms.append(answer)
            case 1:
                forms.append({"rows": answer["rows"], "input_ids": request["input_ids"]})
            case 2:
                rows = [
                    {"tokens": [vocabulary[i] for i in r["ids"]], "log_probs": r["log_probs"]} for r in answer["rows"]
                ]
                forms.append(answer | {"rows": rows})
            case 3:  # backwards, without the mask's number, which is the only one
                rows = [{name: values[::-1] for name, values in row.items()} for row in answer["rows"]]
                forms.append({"sample_id": answer["sample_id"], "rows": rows})
    recording = record(setting, tmp_path / "a.jsonl", forms[::-1], num_parameters=1000)
    out = tmp_path / "cache"
    manifest = build_cache(out, questions, recording)
    cache_of(config, tmp_path / "online", topk=K)
    ours, _ = teacher_of(reading(config, tmp_path / "online"))
    theirs, facts = teacher_of(reading(config, out))
    for number in range(8):
        batch = questions.micro_batch(number)[3]
        expected, found = ours.signal(batch), theirs.signal(batch)
        assert torch.equal(found.ids_NK, expected.ids_NK)
        probs = expected.probs_NK / expected.probs_NK.sum(-1, keepdim=True)
        torch.testing.assert_close(found.probs_NK, probs, rtol=5e-3, atol=0)
    assert facts.path == str(tmp_path / "a.jsonl")
    assert (facts.num_parameters, facts.lineage, len(facts.weights_sha256)) == (1000, None, 64)
    assert manifest.forward_flops == 2 * 1000 * sum(questions.micro_batch(n)[3].num_tokens for n in range(8))
    with pytest.raises(UserError, match=r"topk_semantics=tail needs probabilities at inherit.tau=2.0"):
        teacher_of(reading(config, out, topk_semantics="tail"))


def test_answers_at_the_runs_temperature_keep_their_tail(setting, tmp_path):
    config, _, questions, _, answers = setting
    build_cache(tmp_path / "cache", questions, record(setting, tmp_path / "a.jsonl", answers, answers_tau=2.0))
    teacher, _ = teacher_of(reading(config, tmp_path / "cache", topk_semantics="tail"))
    probs = teacher.signal(questions.micro_batch(0)[3]).probs_NK
    assert probs.sum(-1).max() < 0.5
    expected = [row["log_probs"] for row in answers[0]["rows"]]
    assert probs[: len(expected)].log().tolist() == [pytest.approx(row, rel=1e-3) for row in expected]


def test_rows_may_be_shorter_or_longer_than_k(setting, tmp_path):
    config, _, questions, _, answers = setting
    short = [
        answer | {"rows": [{n: values[:2] for n, values in row.items()} for row in answer["rows"]]}
        for answer in answers[:3]
    ]
    build_cache(tmp_path / "cache", questions, record(setting, tmp_path / "a.jsonl", short + answers[3:], topk=4))
    teacher, _ = teacher_of(reading(config, tmp_path / "cache"))
    found = teacher.signal(questions.micro_batch(0)[3]).probs_NK
    assert (found[:, 2:] == 0).all()
    assert (found[:, :2] > 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(len(found)), rtol=2e-3, atol=0)
    assert (teacher.signal(questions.micro_batch(5)[3]).probs_NK > 0).all()


def row(**changed):
    """A change of the third answer's first row."""

    def change(answers):
        answers[2]["rows"][0] |= changed

    return change


def entry(**changed):
    """A change of the third answer."""

    def change(answers):
        answers[2] |= changed

    return change


BAD = {
    "line 3 has 0 rows for": entry(rows=[]),
    "line 3 is no answer": entry(rows="many"),
    "line 3: sample_id 99999 with mask 0 is not asked about": entry(sample_id=99999),
    "line 3: sample_id None": lambda answers: answers[2].pop("sample_id"),
    "with mask 7 is not asked about": entry(mask=7),
    "line 3: its input_ids are of no request": lambda answers: answers[2].update(
        input_ids=[1], x=answers[2].pop("sample_id")
    ),
    "line 3, row 1 is no row": lambda answers: answers[2]["rows"][0].pop("log_probs"),
    "line 3, row 1: give as many log_probs as ids": row(ids=[1, 2]),
    "row 1: ids and log_probs must be lists of numbers": row(ids=["x"] * K),
    "row 1: id 320 is outside the vocabulary of 320": row(ids=[1, 2, 3, 4, 320]),
    "row 1: id -1 is outside": row(ids=[1, 2, 3, 4, -1]),
    "and no id twice": row(ids=[1, 2, 3, 4, 4]),
    "log_probs up to 0.5 are no logarithms": row(log_probs=[0.5] * K),
    "log_probs up to nan are no logarithms": row(log_probs=[math.nan] * K),
    "lacks the answers to 1 of 16 requests": lambda answers: answers.pop(2),
    "line 3, row 1 is no row; give log_probs, and either ids or tokens": row(tokens=["a"]),
}


@pytest.mark.parametrize("words", BAD)
def test_an_answer_that_cannot_be_used_is_named_by_its_line(setting, tmp_path, words):
    answers = json.loads(json.dumps(setting[4]))
    BAD[words](answers)
    with pytest.raises(UserError) as caught:
        record(setting, tmp_path / "a.jsonl", answers)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_that_are_none(setting, tmp_path):
    answers = json.loads(json.dumps(setting[4]))
    answers[2]["rows"][0] = {"tokens": ["no such token"], "log_probs": [-1.0]}
    with pytest.raises(UserError, match="line 3, row 1: 'no such token' is no token of the vocabulary"):
        record(setting, tmp_path / "a.jsonl", answers)
    with pytest.raises(UserError, match="line 3, row 1 gives tokens, but no tokenizer is known"):
        record(setting, tmp_path / "a.jsonl", answers, tokenizer=None)


@pytest.mark.parametrize("content", [b'{"rows": [', b"\xff\xfe", b"[1, 2]\n"])
def test_a_file_that_is_no_json_lines(setting, tmp_path, content):
    _, _, questions, _, _ = setting
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl") as caught:
        record_answers(tmp_path / "a.jsonl", questions, topk=K, answers_tau=1.0, num_parameters=0, tokenizer=None)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nowhere cannot be read"):
        record_answers(tmp_path / "nowhere", questions, topk=K, answers_tau=1.0, num_parameters=0, tokenizer=None)


def test_other_answers_are_another_teacher(setting, tmp_path):
    _, _, questions, _, answers = setting
    out = tmp_path / "cache"
    build_cache(out, questions, record(setting, tmp_path / "a.jsonl", answers))
    before = Manifest.read(out)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy.jsonl")
    answers = json.loads(json.dumps(answers))
    answers[0]["rows"][0]["log_probs"][0] -= 0.01
    with pytest.raises(UserError, match=r"was made with teacher\.weights_sha256="):
        build_cache(out, questions, record(setting, tmp_path / "a.jsonl", answers))
    assert Manifest.read(out) == before
