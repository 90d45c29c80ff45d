"""One fine-tuning: it learns, it repeats itself, it follows the settings, and any model is taken or refused."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from ki_ds.errors import UserError
from ki_ds.evaluation import finetune
from ki_ds.evaluation.finetune import RANDOM, Candidate, fine_tune, objective
from ki_ds.evaluation.tasks import Settings
from tests.evaluation.data_sets import animals, bert_folder, gpt2_folder, graded, shortened

FAST = Settings(lr=1e-2, batch_size=8, epochs=2)


def tuned(candidate, data, settings=FAST, *, tmp_path, seed=1, **options):
    return fine_tune(candidate, data, settings, seed=seed, scratch=tmp_path / "scratch", **options)


@pytest.fixture(scope="module", params=["mlm", "causal"])
def candidate(request, base):
    return Candidate.find(str(base / f"{request.param}_teacher"))


def test_it_learns_and_repeats_itself(candidate, tmp_path):
    steps = []
    data = animals()
    settings = dataclasses.replace(FAST, epochs=10)
    first = tuned(candidate, data, settings, tmp_path=tmp_path, on_step=steps.append)
    assert first.scores.keys() == {"valid", "test"}
    assert first.scores["test"]["accuracy"] > 0.9  # the majority has two thirds
    assert first.num_steps == 60
    assert 1 <= first.best_epoch <= 10
    assert steps == pytest.approx([i / 60 for i in range(1, 61)])
    again = tuned(candidate, data, settings, tmp_path=tmp_path)
    assert dataclasses.replace(again, seconds=first.seconds) == first


def test_grades_of_pairs(candidate, tmp_path):
    found = tuned(candidate, graded(), dataclasses.replace(FAST, epochs=1), tmp_path=tmp_path)
    assert found.scores.keys() == {"valid"}
    assert all(-1 <= value <= 1 for value in found.scores["valid"].values())


def test_seeds_and_random_weights_differ(candidate, tmp_path, monkeypatch):
    made = []
    build = finetune._model
    monkeypatch.setattr(finetune, "_model", lambda *args: made.append(build(*args)) or made[-1])
    settings = dataclasses.replace(FAST, epochs=1, lr=1e-9)  # so that weights stay as they began
    for some, seed in ((candidate, 1), (candidate, 2), (candidate.untrained(), 1), (candidate.untrained(), 2)):
        tuned(some, shortened(animals(), 8), settings, tmp_path=tmp_path, seed=seed)
    body = [dict(model.base_model.named_parameters()) for model in made]
    name = next(name for name in body[0] if name.endswith("weight") and "orm" not in name and "ln" not in name)
    same = {(i, j): torch.allclose(body[i][name], body[j][name], atol=1e-6) for i in range(4) for j in range(i)}
    assert same[1, 0]  # the trained body
    assert not any(value for pair, value in same.items() if pair != (1, 0))
    heads = [next(p for n, p in model.named_parameters() if n.startswith(("score", "classifier"))) for model in made]
    assert not torch.allclose(heads[0], heads[1], atol=1e-6)
    assert candidate.untrained().name == RANDOM
    assert candidate.untrained().weights is None
    assert candidate.untrained().architecture == candidate.architecture


def test_the_schedule_and_the_optimizer_are_table_8s(base, tmp_path, monkeypatch):
    seen = {}

    class Watched(hf.Trainer):
        def train(self):
            seen.update(trainer=self)
            return super().train()

    monkeypatch.setattr(hf, "Trainer", Watched)
    rates = []
    settings = Settings(lr=1e-3, batch_size=4, epochs=5, micro_batch_size=2)
    data = shortened(animals(), 40)
    tuned(
        Candidate.find(str(base / "mlm_teacher")),
        data,
        settings,
        tmp_path=tmp_path,
        on_step=lambda _: rates.append(seen["trainer"].optimizer.param_groups[0]["lr"]),
    )
    warm, total = 3, 50  # 6% of 50 updates; the callback sees the rate of the next one
    expected = [1e-3 * (s / warm if s < warm else (total - s) / (total - warm)) for s in range(1, total + 1)]
    assert rates == pytest.approx(expected, abs=1e-9)
    groups = seen["trainer"].optimizer.param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.98)}
    assert {group["eps"] for group in groups} == {1e-6}
    assert max(group["weight_decay"] for group in groups) == 0.1
    assert seen["trainer"].args.max_grad_norm == 0.0


@pytest.mark.parametrize("data", [animals(22), graded()], ids=["classes", "grades"])
def test_the_micro_batch_size_changes_nothing(base, tmp_path, monkeypatch, data):
    """The last batch of 22 is smaller: sums over a batch must be divided by its own size."""
    candidate = Candidate.find(str(base / "mlm_teacher"))
    config = json.loads((base / "mlm_teacher/best/config.json").read_text())
    folder = shutil.copytree(base / "mlm_teacher/best", tmp_path / "model")
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    (folder / "config.json").write_text(json.dumps(config | off))
    candidate = Candidate.find(str(folder))
    made = []
    build = finetune._model
    monkeypatch.setattr(finetune, "_model", lambda *args: made.append(build(*args)) or made[-1])
    for micro in (8, 4, 2):
        settings = dataclasses.replace(FAST, lr=1e-3, epochs=1, micro_batch_size=micro)
        tuned(candidate, data, settings, tmp_path=tmp_path)
    for model in made[1:]:
        for one, other in zip(made[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_the_best_epoch_counts(base, tmp_path, monkeypatch):
    """Scores on the validation part are made up to fall after the second epoch."""
    values = iter([0.2, 0.9, 0.1, 0.3])
    right = finetune.all_scores
    monkeypatch.setattr(
        finetune,
        "all_scores",
        lambda data, logits, labels: right(data, logits, labels) | {"accuracy": next(values, 0.7)},
    )
    candidate = Candidate.find(str(base / "mlm_teacher"))
    found = tuned(candidate, animals(16), dataclasses.replace(FAST, epochs=4), tmp_path=tmp_path)
    assert found.best_epoch == 2
    assert found.scores["test"]["accuracy"] == 0.7


def test_the_objective():
    logits, labels = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum()
    assert objective(logits, labels, graded=False) == expected
    assert objective(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0]), graded=True) == 5.0


def test_a_part_of_the_training_examples_is_the_same_for_every_seed(base, tmp_path, monkeypatch):
    taken = []
    sample = finetune._sampled

    def watched(examples, part, settings):
        found = sample(examples, part, settings)
        taken.append((part, found))
        return found

    monkeypatch.setattr(finetune, "_sampled", watched)
    candidate = Candidate.find(str(base / "mlm_teacher"))
    settings = dataclasses.replace(FAST, epochs=1, max_train_samples=8)
    found = [tuned(candidate, animals(), settings, tmp_path=tmp_path, seed=seed) for seed in (1, 2)]
    train = [examples for part, examples in taken if part == "train"]
    assert train[0] == train[1]
    assert len(train[0]) == 8
    assert found[0].num_steps == 1
    assert all(len(examples) == 20 for part, examples in taken if part == "test")


# --- other people's models --------------------------------------------------------------------------------------


def test_bert_with_segments_and_its_positions(base, tmp_path):
    candidate = Candidate.find(str(bert_folder(tmp_path / "bert", base / "corpus/tokenizer")))
    found = tuned(candidate, graded(), dataclasses.replace(FAST, epochs=1), tmp_path=tmp_path)
    assert 0 <= found.share_cut < 1
    long = animals(8)
    long.parts["train"][0] = dataclasses.replace(long.parts["train"][0], text="the cat sleeps " * 20)
    assert tuned(candidate, long, dataclasses.replace(FAST, epochs=1), tmp_path=tmp_path).share_cut > 0


def test_gpt2_without_padding(tmp_path):
    candidate = Candidate.find(str(gpt2_folder(tmp_path / "gpt2")))
    for data in (animals(16), graded()):
        found = tuned(candidate, data, dataclasses.replace(FAST, epochs=1), tmp_path=tmp_path)
        assert found.num_parameters > 0
    tokenizer, config = finetune._tokenizer_and_config(candidate)
    encode = finetune._Encoder(tokenizer, config, 64)
    (row,) = encode(graded().parts["train"][:1])
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1  # between the two texts
    assert "token_type_ids" not in row


def test_padding_changes_no_logits(tmp_path):
    """Rows of one batch differ in length; a causal model's last token must be found, and pads not seen."""
    candidate = Candidate.find(str(gpt2_folder(tmp_path / "gpt2")))
    tokenizer, config = finetune._tokenizer_and_config(candidate)
    model = finetune._model(candidate, animals(), config).eval()
    texts = ["the cat", "one old man sleeps in the garden"]
    with torch.no_grad():
        both = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(both, alone)


def test_padding_is_the_models_own(base, tmp_path):
    """RoBERTa counts positions from the id that pads: another one would move them all."""
    folder = shutil.copytree(base / "mlm_teacher/best", tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "</s>"}))
    tokenizer, config = finetune._tokenizer_and_config(Candidate.find(str(folder)))
    assert (tokenizer.pad_token_id, config.pad_token_id) == (1, 1)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    assert finetune._tokenizer_and_config(Candidate.find(str(folder)))[0].pad_token_id == 1
    config.pad_token_id = -1  # positions count every token, whatever fills up a batch
    config.save_pretrained(folder)
    tokenizer, config = finetune._tokenizer_and_config(Candidate.find(str(folder)))
    assert (tokenizer.pad_token_id, config.pad_token_id) == (2, -1)


def test_half_precision_needs_a_gpu(base, tmp_path):
    settings = dataclasses.replace(FAST, precision="fp16")
    with pytest.raises(UserError, match="--precision=fp16 needs a GPU"):
        tuned(Candidate.find(str(base / "mlm_teacher")), animals(8), settings, tmp_path=tmp_path)


def test_a_full_disk_is_one_line(base, tmp_path, monkeypatch):
    def save(*_args, **_settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", save)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device"):
        tuned(Candidate.find(str(base / "mlm_teacher")), animals(8), tmp_path=tmp_path)


def test_long_examples_are_cut_to_the_models_positions(base):
    candidate = Candidate.find(str(base / "mlm_teacher"))
    tokenizer, config = finetune._tokenizer_and_config(candidate)
    encode = finetune._Encoder(tokenizer, config, 32)
    rows = encode([dataclasses.replace(animals().parts["train"][0], text="the cat sees " * 30)])
    assert len(rows[0]["input_ids"]) == 32
    assert (encode.num_cut, encode.num_encoded) == (1, 1)
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base / "mlm_teacher/best", tmp_path / "model")


def refused(words, folder, tmp_path, **options):
    with pytest.raises(UserError, match=words) as caught:
        tuned(Candidate.find(str(folder), **options), animals(8), tmp_path=tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_model(base, folder, tmp_path):
    refused("cannot be read as a model", base / "corpus", tmp_path)
    refused("cannot be read as a model", tmp_path / "nothing", tmp_path)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    refused("cannot be read as a model", folder, tmp_path)
    (folder / "config.json").write_text("{")
    refused("cannot be read as a model", folder, tmp_path)


def test_weights_that_are_missing(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layer.1" in name)
    save_file(
        {key: value for key, value in state.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(r"lacks 1 weights of its body \(roberta.*layer\.1", folder, tmp_path)


def test_tokenizers_that_are_absent_or_too_large(base, folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused("has no usable tokenizer.*give one with --tokenizer", folder, tmp_path)
    found = Candidate.find(str(folder), tokenizer=str(base / "corpus/tokenizer"))
    assert found.architecture == Candidate.find(str(base / "mlm_teacher")).architecture
    bert = bert_folder(tmp_path / "bert", base / "corpus/tokenizer")
    gpt2 = gpt2_folder(tmp_path / "gpt2")
    refused(r"has 258 embeddings, its tokenizer ids up to \d+; give its own", gpt2, tmp_path, tokenizer=str(bert))


def test_a_model_that_has_no_classifier(base, tmp_path):
    config = hf.GitConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path / "git")
    tokenizer = str(base / "corpus/tokenizer")
    refused(r"\(git\) has no classifier in transformers", tmp_path / "git", tmp_path, tokenizer=tokenizer)


def test_what_does_not_fit_into_memory(base, tmp_path, monkeypatch):
    def train(_self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hf.Trainer, "train", train)
    refused(
        r"32 examples of 32 tokens of .* exceed the memory.*lower --micro_batch_size", base / "mlm_teacher", tmp_path
    )


def test_identities_tell_models_apart(base, folder):
    first = Candidate.find(str(base / "mlm_teacher"))
    assert Candidate.find(str(folder)).weights == first.weights  # the same, wherever it lies
    state = load_file(folder / "model.safetensors")
    state[next(iter(state))][0] += 1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert Candidate.find(str(folder)).weights != first.weights
    assert Candidate.find(str(folder)).architecture == first.architecture
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3}))
    assert Candidate.find(str(folder)).architecture != first.architecture
