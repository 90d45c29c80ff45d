"""DeepSpeed folders: whole weights out of every ZeRO stage; nothing in them is run."""

import os
import shutil
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._weights_only_unpickler import _get_allowed_globals

from ki_ds.convert.safe_pickle import _named, read_checkpoint
from ki_ds.convert.zero import _clean, consolidate, find_checkpoint
from ki_ds.errors import UserError
from tests.tiny import ROOT, tiny_config, tiny_corpus, train_ranks, write_config


@pytest.fixture(scope="module")
def engine(base):
    """The engine's folder of a run with ZeRO 1, and the weights that the run exported."""
    step = sorted((base / "causal_teacher" / "checkpoints").glob("step_*"))[-1]
    return step / "engine", step / "hf"


def exported(folder):
    return load_file(folder / "model.safetensors")


def agree(found, expected):
    """Whether the exported tensors are among the found ones, bit for bit."""
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def test_whole_model_states_need_no_deepspeed(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = consolidate(engine[0])
    agree(found.weights, exported(engine[1]))
    assert found.loader == "torch.load(weights_only=True)"
    assert found.facts["dp_world_size"] == 1


def in_bfloat16(folder, place):
    """The same checkpoint as a bf16 training leaves it: rounded model states beside float32 shards."""
    copied = shutil.copytree(folder, place)
    path = copied / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    state["module"] = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state["module"].items()}
    torch.save(state, path)
    return copied


def test_float32_shards_of_a_half_precision_training(engine, tmp_path):
    folder = in_bfloat16(engine[0], tmp_path / "global_step8")
    found = consolidate(folder)
    assert found.loader.startswith("deepspeed.utils.zero_to_fp32, on copies")
    agree(found.weights, exported(engine[1]))  # the float32 weights, not the rounded ones
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    state["module"]["lm.transformer.ln_f.weight"] += 1
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match=r"transformer\.ln_f\.weight of the shards is not that of the model states"):
        consolidate(folder)


def test_no_room_for_the_copies_is_one_line(engine, tmp_path, monkeypatch):
    folder = in_bfloat16(engine[0], tmp_path / "global_step8")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 MB free, .* MB are needed"):
        consolidate(folder)


def test_shards_without_deepspeed_are_one_line(engine, tmp_path, monkeypatch):
    folder = in_bfloat16(engine[0], tmp_path / "global_step8")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        consolidate(folder)


@pytest.mark.parametrize("world", [3])
def test_stage_3(tmp_path, world):
    """Each parameter lies flat over the ranks, padded to equal shares."""
    draw = torch.Generator().manual_seed(0)
    shapes = OrderedDict({"lm.a.weight": torch.Size([7, 5]), "lm.a.bias": torch.Size([7]), "lm.b": torch.Size([])})
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    flat = [
        torch.nn.functional.pad(t.flatten(), (0, -t.numel() % world)).chunk(world) for t in weights.values()
    ]  # fmt: skip
    for rank in range(world):
        main = {"module": {}, "buffer_names": [], "param_shapes": [shapes], "shared_params": {"lm.c": "lm.a.bias"}}
        main |= {"frozen_param_shapes": None, "frozen_param_fragments": None, "ds_version": "0.19.8", "global_steps": 4}
        shard = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": [torch.cat([part[rank] for part in flat])],
        }
        torch.save(main, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": shard}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = consolidate(tmp_path)
    assert found.weights.keys() == {"a.weight", "a.bias", "b", "c"}
    agree(found.weights, {name.removeprefix("lm."): tensor for name, tensor in weights.items()})
    assert torch.equal(found.weights["c"], weights["lm.a.bias"])
    assert (len(found.files), found.facts["global_steps"]) == (2 * world, 4)


@pytest.mark.slow
def test_stage_3_of_a_training_on_two_ranks(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", num_documents=40)
    groups = {"engine": {"ds_config": str(ROOT / "ds_configs" / "zero3.json")}, "train": {"num_steps": 1}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tmp_path / "run", corpus, task="mlm", **groups))
    for done in train_ranks(config, world=2):
        assert done.returncode == 0, done.stderr
    (step,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    found = consolidate(step / "engine")
    agree(found.weights, exported(step / "hf"))
    assert len(found.files) == 4
    (step / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"DeepSpeed cannot merge .*found 1 files"):
        consolidate(step / "engine")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_hostile_pickles_are_not_run(engine, tmp_path, file, legacy):
    folder = in_bfloat16(engine[0], tmp_path / "global_step8")
    content = torch.load(folder / file, weights_only=False)
    torch.save(content | {"x": Evil(tmp_path / "ran")}, folder / file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"pickles posix\.system, .*nothing of it was run"):
        consolidate(folder)
    assert not (tmp_path / "ran").exists()


def test_what_deepspeed_gets_names_nothing_but_tensors(engine, tmp_path):
    for file in engine[0].glob("*.pt"):
        torch.save(_clean(read_checkpoint(file)), tmp_path / file.name)
        assert _named(tmp_path / file.name) <= set(_get_allowed_globals())
    assert any(name.startswith("deepspeed.") for file in engine[0].glob("*.pt") for name in _named(file))


def test_which_folder(engine, tmp_path):
    assert find_checkpoint(engine[0]) == engine[0]
    assert find_checkpoint(tmp_path) is None
    shutil.copytree(engine[0], tmp_path / "global_step8")
    (tmp_path / "latest").write_text("global_step8\n")
    assert find_checkpoint(tmp_path) == tmp_path / "global_step8"
    run = tmp_path / "run"
    run.mkdir()
    for tag in ("global_step9", "../global_step8", "", ".", str(engine[0]), "global_step8/../../global_step8", "a\nb"):
        (run / "latest").write_text(tag)
        with pytest.raises(UserError, match="latest names") as caught:
            find_checkpoint(run)
        assert "\n" not in str(caught.value)
    shutil.copytree(engine[0], tmp_path / "shards" / "inner")
    for file in engine[0].iterdir():
        shutil.copy(file, tmp_path / "shards")
    (tmp_path / "shards" / "inner" / "latest").write_text("..")
    for file in (tmp_path / "shards" / "inner").glob("*.pt"):
        file.unlink()
    with pytest.raises(UserError, match=r"latest names '\.\.'"):
        find_checkpoint(tmp_path / "shards" / "inner")


@pytest.mark.parametrize("name", ["layer_00-model_states.pt", "mp_rank_01_model_states.pt"])
def test_split_models_are_refused(engine, tmp_path, name):
    folder = shutil.copytree(engine[0], tmp_path / "global_step8")
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"has {name}: the model itself was split"):
        consolidate(folder)
