"""The harness lm-eval on an exported causal folder, with a task of its own and no network."""

import json
import math

import pytest
import torch
import transformers as hf
import yaml

from ki_ds.convert.export import Options, convert
from ki_ds.data.tokenize import load_tokenizer

pytest.importorskip("lm_eval", reason="the package lm-eval is not installed")

QUESTIONS = [
    {"context": "the cat sees", "choices": ["a dog", "in the garden"], "gold": 0},
    {"context": "every child", "choices": ["likes her sister again.", "night night"], "gold": 0},
    {"context": "one old man has found", "choices": ["with the", "some student at night."], "gold": 1},
]
TASK = {
    "task": "local_choices",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
    (folder / "local.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def log_likelihood(model, tokenizer, context, continuation, eos):
    """In nats, of a continuation behind a context that follows `</s>`, as in training."""
    ids, whole = (tokenizer(t, add_special_tokens=False).input_ids for t in (context, f"{context} {continuation}"))
    assert whole[: len(ids)] == ids
    with torch.no_grad():
        logits = model(torch.tensor([[eos, *whole]])).logits[0].log_softmax(-1)
    return sum(float(logits[place, whole[place]]) for place in range(len(ids), len(whole)))


def test_a_local_task(base, tmp_path, task_folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    run = base / "causal_teacher"
    convert(run, tmp_path / "out", Options(), say=lambda _: None)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "dtype": "float32"},
        tasks=["local_choices"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    model = hf.AutoModelForCausalLM.from_pretrained(run / "best").eval()
    tokenizer = load_tokenizer(base / "corpus/tokenizer")
    right = 0
    for sample, question in zip(found["samples"]["local_choices"], QUESTIONS, strict=True):
        expected = [
            log_likelihood(model, tokenizer, question["context"], choice, tokenizer.eos_token_id)
            for choice in question["choices"]
        ]
        likelihoods = [response[0] for response in sample["filtered_resps"]]
        assert likelihoods == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == question["gold"]
    assert found["results"]["local_choices"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert all(math.isfinite(value) for value in likelihoods)
