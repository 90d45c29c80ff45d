"""What can be converted, found by what lies there; options that do not belong to it are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from ki_ds.convert.sources import open_source, task_of
from ki_ds.errors import UserError
from tests.convert.fairseq_files import Gpt, Roberta, save


def opened(path, *, step=None, config=None, dictionary=None):
    return open_source(Path(path), step=step, config=config, dictionary=dictionary)


@pytest.fixture(scope="module")
def run_dir(base, tmp_path_factory):
    """A finished run that may be damaged."""
    return shutil.copytree(base / "causal_teacher", tmp_path_factory.mktemp("sources") / "run")


def test_a_run_gives_its_best_weights_or_a_checkpoint(run_dir):
    best = opened(run_dir)
    assert (best.task, best.files) == ("causal", (run_dir / "best" / "model.safetensors",))
    assert float(best.facts["validation perplexity"]) > 1
    assert best.facts["steps of the run"] == 8
    assert best.lineage["name"] == "causal_teacher"
    assert best.tokenizer_dir == run_dir / "best"
    last = opened(run_dir, step=8)
    assert last.facts["step"] == 8
    assert last.what == "checkpoint step_00000008"
    expected = load_file(run_dir / "checkpoints" / "step_00000008" / "hf" / "model.safetensors")
    model = last.model(torch.float32)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert opened(run_dir / "checkpoints" / "step_00000008").sha256() == last.sha256()
    with pytest.raises(UserError, match=r"step_00000003 does not exist; checkpoints of this run are at steps 6, 8"):
        opened(run_dir, step=3)


def test_a_checkpoint_away_from_its_run(run_dir, tmp_path):
    moved = shutil.copytree(run_dir / "checkpoints" / "step_00000008", tmp_path / "some" / "where" / "step_00000008")
    source = opened(moved)
    assert (source.task, source.facts["step"]) == ("causal", 8)
    assert "run" not in source.facts


@pytest.mark.parametrize("file", ["hf/model.safetensors", "hf/config.json", "engine/mp_rank_00_model_states.pt"])
def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path, file):
    folder = shutil.copytree(run_dir / "checkpoints" / "step_00000008", tmp_path / "step_00000008")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} has changed"):
        opened(folder)


def test_fairseq_files_and_their_dictionary(tmp_path):
    path = save(tmp_path / "model.pt", Roberta(), lr=[0.1], data="/home/me/data-bin")
    source = opened(path)
    assert (source.task, source.dictionary, source.pads_vocabulary) == ("mlm", None, False)
    assert (source.facts["updates"], source.facts["data"], source.facts["lr"]) == (60, "data-bin", [0.1])
    assert source.facts["best validation perplexity"] == "32.00"  # 2 ** 5 bits
    (tmp_path / "dict.txt").write_text("1 2\n")
    assert opened(path).dictionary == tmp_path / "dict.txt"
    assert opened(path, dictionary=Path("other")).dictionary == Path("other")


def test_a_student_of_the_released_trainer_says_who_taught_it(tmp_path):
    flags = {"criterion": "masked_lm_distil", "arch_distil_from": "roberta", "temperature_distil": 2.0}
    facts = opened(save(tmp_path / "model.pt", Roberta(), **flags, max_update_distil=40)).facts
    assert (facts["taught by"], facts["temperature_distil"], facts["max_update_distil"]) == ("roberta", 2.0, 40)
    assert "best validation perplexity" not in facts  # the noted loss is a mixture


class TestDeepSpeed:
    @pytest.fixture
    def folder(self, run_dir, tmp_path):
        """As others leave it: latest, global_step8/, config.json."""
        step = run_dir / "checkpoints" / "step_00000008"
        shutil.copytree(step / "engine", tmp_path / "theirs" / "global_step8")
        (tmp_path / "theirs" / "latest").write_text("global_step8")
        shutil.copy(step / "hf" / "config.json", tmp_path / "theirs")
        return tmp_path / "theirs"

    def test_its_model(self, folder, run_dir):
        expected = load_file(run_dir / "checkpoints" / "step_00000008" / "hf" / "model.safetensors")
        for path in (folder, folder / "global_step8"):
            source = opened(path)
            state = source.model(torch.float32).state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
            assert source.facts["global_steps"] == 8
            assert source.notes == ("read with torch.load(weights_only=True)",)
        (folder / "config.json").rename(folder.parent / "config.json")
        assert opened(folder, config=folder.parent / "config.json").task == "causal"
        (folder.parent / "config.json").unlink()
        with pytest.raises(UserError, match=r"has no config\.json beside it"):
            opened(folder)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"n_layer": 3}, r"lacks transformer\.h\.2\.\S+ \[\d+.*\] of GPT2LMHeadModel"),
            ({"n_layer": 1}, r"has transformer\.h\.1\.\S+ \[.*\], which GPT2LMHeadModel has not"),
            ({"n_positions": 99}, r"transformer\.wpe\.weight is \[32, 16\], config.json needs \[99, 16\]"),
            ({"architectures": ["GPT2Model"]}, "is of GPT2Model, no masked or causal language model"),
            ({"model_type": "nothing"}, "cannot be read as a model"),
        ],
    )
    def test_a_configuration_of_another_model(self, folder, changes, words):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words) as caught:
            opened(folder).model(torch.float32)
        assert "\n" not in str(caught.value)


def test_options_that_do_not_belong(run_dir, tmp_path):
    path = save(tmp_path / "model.pt", Gpt())
    for place, options in (
        (path, {"step": 3}),
        (path, {"config": tmp_path}),
        (run_dir, {"config": tmp_path}),
        (run_dir, {"dictionary": tmp_path}),
        (run_dir / "checkpoints" / "step_00000008", {"step": 8}),
    ):
        with pytest.raises(UserError, match="has no meaning for"):
            opened(place, **options)


def test_nothing_to_convert(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "nothing")
    with pytest.raises(UserError, match="no run, no checkpoint of ours and no DeepSpeed folder"):
        opened(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="without weights yet"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (hf.RobertaConfig(), "mlm"),
        (hf.RobertaConfig(architectures=["RobertaForCausalLM"]), "causal"),
        (hf.GPT2Config(), "causal"),
        (hf.LlamaConfig(), "causal"),
        (hf.BertConfig(architectures=["BertForMaskedLM"]), "mlm"),
        (hf.BertConfig(architectures=["BertForSequenceClassification"]), None),
        (hf.ViTConfig(), None),
    ],
)
def test_the_task_of_a_configuration(config, task):
    if task is not None:
        assert task_of(config) == task
        return
    with pytest.raises(UserError, match="no masked or causal language model"):
        task_of(config)
