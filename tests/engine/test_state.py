"""A checkpoint of any ZeRO stage and number of ranks goes on at any other, with weights and moments as they were."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ki_ds.engine import state as engine_state
from ki_ds.errors import UserError
from tests.tiny import ROOT, inherit, records, run_ranks, tiny_config, write_config

QUIET = {"dropout": 0.0, "attention_dropout": 0.0}  # which depends on the rank
OPTIM = {"lr": 3e-3, "decay_norms_and_biases": False, "weight_decay": 5.0}  # so that a mix-up of the groups shows


def losses(run_dir):
    return [r["loss"] for r in records(run_dir, "train")]


def last_weights(run_dir):
    return load_file(sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "hf" / "model.safetensors")


def alike(part, whole):
    """The largest difference of a weight at the end; losses and weights are held to 1e-5."""
    assert [r["step"] for r in records(part, "train")] == [1, 2, 3, 4, 5, 6]
    assert losses(part) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = last_weights(part), last_weights(whole)
    assert found.keys() == expected.keys()
    worst = max((found[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < 1e-5
    return worst


@pytest.fixture(scope="module")
def whole(base):
    return inherit(base, "stages_whole", model=QUIET, optim=OPTIM)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("zero0", "zero3"),
        ("zero3", "zero1"),
        ("zero2", "zero0"),
        *(
            pytest.param(first, second, marks=pytest.mark.slow)
            for first, second in [
                ("zero0", "zero1"),
                ("zero0", "zero2"),
                ("zero1", "zero0"),
                ("zero1", "zero2"),
                ("zero1", "zero3"),
                ("zero2", "zero1"),
                ("zero2", "zero3"),
                ("zero3", "zero0"),
                ("zero3", "zero2"),
                ("zero3_offload", "zero2_offload"),
                ("zero2_offload", "zero3_offload"),
            ]
        ),
    ],
)
def test_another_stage_goes_on_from_the_same_state(base, whole, first, second, record_property):
    name = f"{first}_then_{second}"
    for zero, stop in ((first, 4), (second, 6)):
        engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
        part = inherit(base, name, engine=engine, model=QUIET, optim=OPTIM, train={"stop_at_step": stop})
    record_property("figure", f"{first} to {second}: weights differ by {alike(part, whole):.0e} two updates later")
    assert not list((part / "checkpoints").glob(".*"))


def many(base, name, world, parts):
    """Train several tiny runs to a step, one after another, on so many ranks."""
    files = []
    for run_dir, zero, stop in parts:
        config = tiny_config(
            run_dir,
            base / "corpus",
            teacher={"path": str(base / "mlm_teacher")},
            inherit={"schedule": "linear", "steps": 4},
            engine={"ds_config": str(ROOT / f"ds_configs/{zero}.json")},
            model=QUIET,
            optim=OPTIM,
            train={"stop_at_step": stop},
        )
        files.append(str(write_config(base / f"{name}_{len(files)}.yaml", config)))
    results = run_ranks(["-m", "tests.workers.train_many", *files], world=world, timeout=1500)
    assert [r.returncode for r in results] == [0] * world, results[0].stderr[-2000:]


def test_another_number_of_ranks_with_another_stage(base, whole):
    """Two ranks to one, and from and to stage 3."""
    parts = [(base / f"two_{zero}", zero) for zero in ("zero3", "zero1")]
    many(base, "two", 2, [(run_dir, zero, 4) for run_dir, zero in parts])
    for (run_dir, _), zero in zip(parts, ("zero3", "zero3"), strict=True):
        engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
        alike(inherit(base, run_dir.name, engine=engine, model=QUIET, optim=OPTIM), whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_change_of_the_number_of_ranks(base, whole, record_property):
    """{1, 2, 4} x {1, 2, 4} at ZeRO 1 and at ZeRO 3: 12 changes and 6 that are none."""
    worlds, stages = (1, 2, 4), ("zero1", "zero3")
    folder = {(a, b, zero): base / f"worlds_{a}_{b}_{zero}" for a in worlds for b in worlds for zero in stages}
    for a in worlds:
        many(base, f"first_{a}", a, [(folder[a, b, zero], zero, 4) for b in worlds for zero in stages])
    for b in worlds:
        many(base, f"then_{b}", b, [(folder[a, b, zero], zero, 6) for a in worlds for zero in stages])
    worst = max(alike(run_dir, whole) for run_dir in folder.values())
    losses_off = max(
        abs(x / y - 1) for each in folder.values() for x, y in zip(losses(each), losses(whole), strict=True)
    )
    record_property("figure", f"12/12 changes: losses differ by {losses_off:.0e}, weights by {worst:.0e}")
    assert losses_off < 1e-6


def test_other_groups_of_parameters_are_refused(base, tmp_path):
    """Stage 0 keeps moments by their place in the groups."""
    run_dir = inherit(base, "grouped", model=QUIET, optim=OPTIM, engine={"ds_config": "ds_configs/zero0.json"})
    folder = sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "engine"
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    assert len(sizes) == 2
    names = [f"p{number}" for number in range(sum(sizes))]
    assert engine_state.read(folder, names, sizes, stage=0).counters["global_steps"] == 6
    with pytest.raises(UserError, match="other groups of parameters"):
        engine_state.read(folder, names, [sum(sizes)], stage=0)
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
