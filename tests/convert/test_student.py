"""Whatever a run exports is the model that it measured, in plain Hugging Face code as in ours; with padding to cut."""

import json
import math
import os
import shutil
import stat

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from ki_ds import config as configuration
from ki_ds.checkpoints import checkpoint, lineage
from ki_ds.convert.export import Options, convert
from ki_ds.data import datasets
from ki_ds.data.batches import ValidBatches
from ki_ds.data.tokenize import load_tokenizer, tokenizer_hash
from ki_ds.errors import UserError
from ki_ds.evaluation.perplexity import data_of_run, measure
from ki_ds.models.presets import weights_sha256
from ki_ds.training.setup import load_data
from tests.tiny import ROOT, inherit, records, run, tiny_corpus

NUM_IDS = 331  # trained with 384 rows
AUTO = {"mlm": hf.AutoModelForMaskedLM, "causal": hf.AutoModelForCausalLM}
SETTINGS = {"mlm": ("zero1", True), "causal": ("zero3", False)}  # ZeRO, saves in the background


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A folder with a corpus and a run of each task, whose embeddings are padded."""
    folder = tmp_path_factory.mktemp("padded")
    corpus = tiny_corpus(folder / "corpus", vocab_size=NUM_IDS)
    for task, (zero, background) in SETTINGS.items():
        engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
        train = {"num_steps": 12, "eval_every": 6, "save_every": 6, "save_in_background": background}
        run(folder / task, corpus, task=task, engine=engine, train=train)
    return folder


def plain(folder, run_dir):
    """(perplexity, largest of some sampled ids) of full softmax on a run's validation rows, by transformers alone."""
    config = configuration.load(run_dir / "config.yaml")
    lm = AUTO[config.task].from_pretrained(folder).double().eval()
    ce_sum, num_rows, largest = 0.0, 0, 0
    blocks, chosen = load_data(config).valid["corpus"], config.data.max_valid_samples
    for batch in ValidBatches(blocks, micro_batch_size=3, max_samples=chosen):
        with torch.no_grad():
            logits = lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
        rows = logits.flatten(0, 1)[batch.rows_N]
        ce_sum += torch.nn.functional.cross_entropy(rows, batch.row_labels_N, reduction="sum").item()
        num_rows += batch.num_rows
        largest = max(largest, int(torch.multinomial(rows.softmax(-1), 8).max()))
    return math.exp(ce_sum / num_rows), largest


@pytest.mark.parametrize("task", SETTINGS)
def test_every_folder_has_the_perplexity_of_training(padded, tmp_path, task):
    run_dir = padded / task
    convert(run_dir, tmp_path / "converted", Options(), say=lambda _: None)
    last = run_dir / "checkpoints" / "step_00000012"
    lines: list[str] = []
    convert(last / "engine", tmp_path / "engine", Options(config=last / "hf"), say=lines.append)
    assert any("left out: the embedding's 53 rows of padding beyond 331 ids" in line for line in lines)
    expected = records(run_dir, "valid")[-1]["ppl"]
    data, _ = data_of_run(str(run_dir))
    for folder in (run_dir / "best", last / "hf", tmp_path / "converted", tmp_path / "engine"):
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == NUM_IDS
        found, largest = plain(folder, run_dir)
        assert found == pytest.approx(expected, rel=1e-5)
        assert largest < NUM_IDS
    (ours,) = measure([str(run_dir)], data, task, index_dir=tmp_path, show_progress=False)
    assert ours.together.ppl == pytest.approx(expected, rel=1e-5)
    assert ours.tokenizer_checked


@pytest.mark.parametrize("task", SETTINGS)
def test_deepspeeds_own_tool_takes_a_checkpoint(padded, task):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    step = padded / task / "checkpoints" / "step_00000012"
    assert checkpoint.damage(step) is None
    assert {"latest", "README.md"} < json.loads((step / "manifest.json").read_text())["files"].keys()
    state = get_fp32_state_dict_from_zero_checkpoint(str(step))
    for name, tensor in load_file(step / "hf" / "model.safetensors").items():
        assert torch.equal(state[f"lm.{name}"][tuple(map(slice, tensor.shape))], tensor), name


@pytest.mark.parametrize("task", SETTINGS)
def test_best_is_whole_by_itself(padded, tmp_path, task):
    best = padded / task / "best"
    convert(padded / task, tmp_path / "converted", Options(), say=lambda _: None)
    theirs = {file.name for file in (tmp_path / "converted").iterdir()}
    assert {file.name for file in best.iterdir()} == theirs | {"valid.json"}
    for name in theirs - {"README.md", "lineage.json"}:
        assert (best / name).read_bytes() == (tmp_path / "converted" / name).read_bytes(), name
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(file.stat().st_mode) for file in best.iterdir()} == {0o666 & ~umask}
    card = (best / "README.md").read_text()
    for words in (f"# {task}", f"vocabulary: {NUM_IDS}", "validation perplexity: ", "## Lineage", "- step: 12"):
        assert words in card, words
    record = lineage.read(best, weights_sha256(str(best)))
    assert record["num_parameters"] == AUTO[task].from_pretrained(best).num_parameters()
    tokenizer = hf.AutoTokenizer.from_pretrained(best)
    assert tokenizer.model_max_length == 32
    assert len(tokenizer("the cat sees a dog " * 40, truncation=True).input_ids) == 32
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer(padded / "corpus" / "tokenizer"))


def test_generation_begins_where_training_did(padded):
    best = padded / "causal" / "best"
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(best), hf.AutoTokenizer.from_pretrained(best)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (2, 2)
    assert (model.generation_config.pad_token_id, model.config.use_cache) == (1, True)
    out = model.generate(max_new_tokens=3, do_sample=False)
    assert out[0, 0] == 2
    assert tokenizer("the cat").input_ids[0] == 2
    assert tokenizer.bos_token_id == 2  # with which the harness and others begin by themselves
    assert hf.pipeline("text-generation", str(best))("the cat", max_new_tokens=3)[0]["generated_text"]


def test_a_folder_teaches_starts_and_goes_on(padded):
    best = str(padded / "mlm" / "best")
    model = {"name": best, "init": "pretrained"}
    model |= dict.fromkeys(("num_layers", "hidden_size", "num_heads", "ffn_size"), None)
    configs = {"model": {**model, "num_positions": 512}, "teacher": {"path": best}}
    for stop in (4, 6):
        inherit(padded, "second", train={"stop_at_step": stop}, **configs)
    assert [r["step"] for r in records(padded / "second", "train")] == [1, 2, 3, 4, 5, 6]
    first = records(padded / "second", "valid")[0]["ppl"]
    assert first == pytest.approx(records(padded / "mlm", "valid")[-1]["ppl"], rel=1e-5)
    weights = load_file(padded / "second" / "best" / "model.safetensors")
    assert weights["roberta.embeddings.word_embeddings.weight"].shape[0] == NUM_IDS
    whole = inherit(padded, "second_whole", **configs)
    hashes = [weights_sha256(str(d / "checkpoints/step_00000006/hf")) for d in (padded / "second", whole)]
    assert hashes[0] == hashes[1]


def test_megatron_data_with_another_models_folder_as_tokenizer(padded):
    """The tokenizer alone comes from there: neither its weights nor its configuration, nor what lies in sub-folders."""
    theirs = padded / "another"
    shutil.copytree(padded / "mlm" / "best", theirs)
    (theirs / "onnx").mkdir()
    data = {"corpus": str(padded / "corpus" / "train"), "tokenizer": str(theirs), "valid_fraction": 0.1}
    run_dir = run(padded / "megatron", padded / "corpus", data=data, model={"hidden_size": 16}, train={"num_steps": 2})
    for folder in (run_dir / "best", run_dir / "checkpoints/step_00000002/hf"):
        assert hf.AutoModelForMaskedLM.from_pretrained(folder).config.hidden_size == 16
        assert weights_sha256(str(folder)) != weights_sha256(str(theirs))
        assert lineage.read(folder, weights_sha256(str(folder)))["name"] == "megatron"
        assert not (folder / "onnx").exists()
        assert hf.AutoTokenizer.from_pretrained(folder).model_max_length == 32


def test_a_tokenizer_that_cannot_be_exported_is_refused_before_the_first_step(padded, monkeypatch):
    def refuse(*_, **__):
        raise UserError("gives other ids once it is saved")

    monkeypatch.setattr(datasets, "tokenizer_files", refuse)
    with pytest.raises(UserError, match="gives other ids once it is saved"):
        run(padded / "refused", padded / "corpus")
    assert not (padded / "refused" / "config.yaml").exists()
