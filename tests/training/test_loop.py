import hashlib
import json
import math
import os
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, FNetConfig, MixtralConfig

from ki_ds import config as configuration
from ki_ds.config import schedules
from ki_ds.data.batches import ValidBatches
from ki_ds.errors import UserError
from ki_ds.training import loop as training
from ki_ds.training.loop import train
from ki_ds.training.setup import load_data
from tests.commands import dying, ended, start
from tests.lms import GQA, TINY
from tests.tiny import ROOT, inherit, records, run, run_ranks, tiny_config, train_ranks, write_config


def weights_hash(run_dir, step=None):
    """Of a checkpoint's model, the newest one's unless a step is named."""
    newest = sorted((run_dir / "checkpoints").glob("step_*" if step is None else f"step_{step:08d}"))[-1]
    return hashlib.sha256((newest / "hf" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_a_student_inherits_and_everything_is_reported(base, task):
    run_dir = inherit(base, f"{task}_student", task)
    steps = records(run_dir, "train")
    assert [r["alpha"] for r in steps] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert all(r["kl"] > 0 for r in steps[:4])
    assert all(r["kl"] == 0 and r["loss"] == r["ce"] for r in steps[4:])
    for r in steps[:4]:
        assert r["loss"] == pytest.approx((1 - r["alpha"]) * r["ce"] + r["alpha"] * 4 * r["kl"], rel=1e-6)
    manifest = json.loads((run_dir / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert steps[-1]["student_flops"] == 6 * manifest["student"]["dense_parameters"] * steps[-1]["tokens"]
    assert steps[-1]["teacher_flops"] == 2 * manifest["teachers"][0]["dense_parameters"] * steps[3]["tokens"]
    valid = records(run_dir, "valid")
    assert [r["step"] for r in valid] == [0, 3, 6]
    assert valid[-1]["ppl"] < valid[0]["ppl"]


def test_monitors_get_the_same_figures_under_the_same_names(base):
    run_dir = inherit(base, "monitored", monitor={"csv": True}, data={"num_workers": 1}, train={"num_steps": 4})
    for name in ("loss", "ce", "kl", "alpha", "lr", "tokens_per_second"):
        lines = (run_dir / "monitor" / "csv" / f"train_{name}.csv").read_text().splitlines()[1:]
        values = [(r["samples"], r[name]) for r in records(run_dir, "train")]
        assert [tuple(map(float, line.split(","))) for line in lines] == [pytest.approx(pair) for pair in values]
    assert (run_dir / "monitor" / "csv" / "valid_ppl.csv").exists()


@pytest.mark.parametrize("task", ["mlm", "causal"])
def test_validation_is_the_exported_models_own_perplexity(base, task):
    run_dir = base / f"{task}_teacher"
    auto = AutoModelForMaskedLM if task == "mlm" else AutoModelForCausalLM
    lm = auto.from_pretrained(run_dir / "best").double().eval()
    assert AutoTokenizer.from_pretrained(run_dir / "best")("the cat").input_ids
    config = configuration.load(run_dir / "config.yaml")
    data = load_data(config)
    ce_sum, num_rows = 0.0, 0
    for batch in ValidBatches(data.valid["corpus"], micro_batch_size=3, max_samples=config.data.max_valid_samples):
        with torch.no_grad():
            logits = lm(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
        rows = logits.flatten(0, 1)[batch.rows_N][:, : data.vocabulary.size]
        ce_sum += torch.nn.functional.cross_entropy(rows, batch.row_labels_N, reduction="sum").item()
        num_rows += batch.num_rows
    best = json.loads((run_dir / "best" / "valid.json").read_text())
    assert best["num_rows"] == num_rows
    assert best["ppl"] == pytest.approx(math.exp(ce_sum / num_rows), rel=1e-5)
    assert best["ppl"] == min(r["ppl"] for r in records(run_dir, "valid"))


@pytest.mark.parametrize(
    ("zero", "stops"),
    [
        ("zero0", (5,)),
        ("zero1", (2, 4)),
        ("zero2", (5,)),
        ("zero3", (4,)),
        *(pytest.param(f"zero{stage}", (2, 4, 5), marks=pytest.mark.slow) for stage in range(4)),
    ],
)
def test_resume_is_bitwise_the_same_run(base, zero, stops):
    engine = {"engine": {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}}
    whole = inherit(base, f"whole_{zero}_{len(stops)}", **engine)
    for stop in stops:
        name = f"part_{zero}_{len(stops)}_{stop}"
        inherit(base, name, train={"stop_at_step": stop}, **engine)
        part = inherit(base, name, **engine)
        assert weights_hash(part) == weights_hash(whole)
        for kind in ("train", "valid"):
            values = [[(r["step"], r["ce"], r["tokens"]) for r in records(d, kind)] for d in (part, whole)]
            assert set(values[1]) <= set(values[0])  # the part was validated once more, where it stopped
        assert (part / "run.json").read_text().count("finished") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_resumed_at_every_step_it_is_bitwise_the_same_run(base, zero, record_property):
    engine = {"ds_config": str(ROOT / f"ds_configs/{zero}.json")}
    train = {"num_steps": 20, "save_every": 1, "eval_every": 20, "keep_checkpoints": 20}
    whole = inherit(base, f"every_whole_{zero}", engine=engine, train=train)
    for step in range(1, 21):
        part = inherit(base, f"every_part_{zero}", engine=engine, train={**train, "stop_at_step": step})
    assert [(r["step"], r["loss"]) for r in records(part, "train")] == [
        (r["step"], r["loss"]) for r in records(whole, "train")
    ]
    hashes = [[weights_hash(d, step) for step in range(1, 21)] for d in (part, whole)]
    assert len(set(hashes[1])) == 20
    assert hashes[0] == hashes[1]
    record_property("figure", f"{zero}: resumed at 19 of 19 steps, 20/20 losses and weight hashes equal")


TOTALS = ("step", "samples", "tokens", "student_flops", "teacher_flops")


def saved_totals(run_dir, step):
    """What a checkpoint says that the run has cost so far."""
    state = json.loads((run_dir / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    return [state["totals"][name] for name in TOTALS]


@pytest.mark.parametrize(
    ("log_every", "in_background", "deaths"),
    [(1, False, [3]), (10, False, [1, 2, 3, 5, 9, 11]), (10, True, [3]), (100, False, [3])],
)
def test_totals_are_whole_at_every_save_and_after_every_resume(base, monkeypatch, log_every, in_background, deaths):
    """A run that dies goes on with what the one that never did has, line by line and checkpoint by checkpoint."""
    train = {"num_steps": 12, "save_every": 1, "eval_every": 100, "keep_checkpoints": 12, "log_every": log_every}
    train["save_in_background"] = in_background
    name = f"totals_{log_every}_{in_background}"
    whole = inherit(base, f"{name}_whole", train=train)
    for death in deaths:
        with dying(monkeypatch, training, "train_step", lambda run, *_, at=death: run.totals.step == at):
            inherit(base, name, train=train)
    part = inherit(base, name, train=train)
    lines = [[[r[key] for key in (*TOTALS, "loss", "ce", "kl")] for r in records(d, "train")] for d in (part, whole)]
    assert lines[0] == lines[1]
    for number in range(1, 13):
        assert saved_totals(part, number) == saved_totals(whole, number)
        assert saved_totals(part, number)[:2] == [number, 8 * number]
    tokens = [saved_totals(whole, number)[2] for number in range(1, 13)]
    assert sorted(set(tokens)) == tokens  # every save counts what was trained since the one before
    for run_dir in (part, whole):  # the last line's rate is that of its own window
        seconds = [0.0, *(r["seconds"] for r in records(run_dir, "train"))]
        counted = [0, *(r["tokens"] for r in records(run_dir, "train"))]
        rate = (counted[-1] - counted[-2]) / (seconds[-1] - seconds[-2])
        assert records(run_dir, "train")[-1]["tokens_per_second"] == pytest.approx(rate)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("log_every", [1, 10, 100])
def test_killed_between_two_lines_the_totals_are_those_of_a_run_never_stopped(base, log_every, record_property):
    train = {"num_steps": 60, "save_every": 1, "eval_every": 100, "log_every": log_every, "keep_checkpoints": 60}
    whole = inherit(base, f"killed_whole_{log_every}", train=train)
    run_dir = base / f"killed_{log_every}"
    teaching = {"teacher": {"path": str(base / "mlm_teacher")}, "inherit": {"schedule": "linear", "steps": 4}}
    config = write_config(
        base / f"killed_{log_every}.yaml", tiny_config(run_dir, base / "corpus", train=train, **teaching)
    )
    for kill in range(1, 21):  # at steps 3, 6, ..., with log_every 10 and 100 between two lines
        processes = start(config, 1)
        until = time.monotonic() + 300
        while not (run_dir / "checkpoints" / f"step_{3 * kill - 1:08d}").exists():
            assert time.monotonic() < until
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.002)
        processes[0].kill()
        ended(processes)
    inherit(base, run_dir.name, train=train)
    assert saved_totals(run_dir, 60) == saved_totals(whole, 60)
    keys = (*TOTALS, "loss", "ce", "kl")
    assert [[r[key] for key in keys] for r in records(run_dir, "train")] == [
        [r[key] for key in keys] for r in records(whole, "train")
    ]
    record_property("figure", f"log_every {log_every}: 20 kills, totals and lines as never stopped")


def test_resume_on_two_ranks_is_bitwise_too(base):
    files = []
    for name, stop in (("two_whole", 6), ("two_part", 4), ("two_part", 6)):
        config = tiny_config(
            base / name,
            base / "corpus",
            teacher={"path": str(base / "mlm_teacher")},
            inherit={"schedule": "linear", "steps": 4},
            train={"stop_at_step": stop},
        )
        files.append(str(write_config(base / f"{name}_{stop}.yaml", config)))
    results = run_ranks(["-m", "tests.workers.train_many", *files], world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    assert "going on from" in results[0].stdout
    assert weights_hash(base / "two_part") == weights_hash(base / "two_whole")


def test_another_number_of_ranks_goes_on_from_the_same_state(base):
    """From two ranks to one: the next losses are those of the run that never stopped (dropout off)."""
    quiet = {"model": {"dropout": 0.0, "attention_dropout": 0.0}}
    whole = run(base / "one", base / "corpus", **quiet)
    config = tiny_config(base / "two_then_one", base / "corpus", **quiet)
    path = write_config(base / "two_then_one.yaml", config)
    assert [r.returncode for r in train_ranks(path, "--train.stop_at_step", "4", world=2)] == [0, 0]
    train(configuration.load(path))
    losses = [[r["ce"] for r in records(d, "train")] for d in (whole, base / "two_then_one")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_finished_run_is_not_repeated(base, capsys):
    before = weights_hash(inherit(base, "again"))
    lines = (base / "again" / "metrics.jsonl").read_text()
    inherit(base, "again")
    assert "is finished" in capsys.readouterr().out
    assert (base / "again" / "metrics.jsonl").read_text() == lines
    assert weights_hash(base / "again") == before


def test_a_damaged_checkpoint_is_passed_over(base, capsys):
    whole = weights_hash(inherit(base, "intact"))
    inherit(base, "damaged_checkpoint", train={"stop_at_step": 4})
    newest = base / "damaged_checkpoint" / "checkpoints" / "step_00000004" / "engine" / "mp_rank_00_model_states.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    inherit(base, "damaged_checkpoint")
    out = capsys.readouterr().out
    assert "mp_rank_00_model_states.pt has changed" in out
    assert "step_00000002" in out
    assert weights_hash(base / "damaged_checkpoint") == whole


def test_inheriting_can_go_on_as_self_learning(base):
    inherit(base, "switch", train={"stop_at_step": 2})
    none = {"teacher": {"path": None}, "inherit": {"schedule": "none", "steps": None}}
    with pytest.raises(UserError, match=r"inherit.schedule=linear, now it is none"):
        inherit(base, "switch", **none)
    inherit(base, "switch", **none, train={"changed_config": "allow"})
    assert [r["alpha"] for r in records(base / "switch", "train")] == [1.0, 0.75, 0, 0, 0, 0]


def test_a_loss_that_is_no_number_stops_the_run_with_a_line(base, monkeypatch):
    rate = schedules.learning_rate
    monkeypatch.setattr(schedules, "learning_rate", lambda t, **k: math.nan if t == 2 else rate(t, **k))
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        run(base / "diverged", base / "corpus", train={"save_every": 2})
    assert sorted(p.name for p in (base / "diverged" / "checkpoints").glob("step_*")) == ["step_00000002"]


def test_nobody_else_can_write_what_a_run_makes(base, capsys):
    before = os.umask(0)
    try:
        folder = inherit(base, "open_to_all", train={"stop_at_step": 2})
        made = [path for path in (folder, *folder.rglob("*")) if path.stat().st_mode & 0o002]
        assert made == []
        assert "can be written by every user" not in capsys.readouterr().out
        folder.chmod(0o777)
        inherit(base, "open_to_all", train={"stop_at_step": 3})
    finally:
        os.umask(before)
    assert f"run_dir={folder} can be written by every user" in capsys.readouterr().out


def test_an_architectures_own_loss_is_trained_and_a_figure_of_its_own(base):
    config = MixtralConfig(
        **GQA | {"vocab_size": 384, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1},
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    config.save_pretrained(base / "experts")
    given = tiny_config(base / "routed", base / "corpus", task="causal", monitor={"csv": True}, train={"num_steps": 3})
    given["model"] = {"name": str(base / "experts"), "init": "random"}
    train(configuration.load(write_config(base / "routed.yaml", given)))
    for record in records(base / "routed", "train"):
        assert 0.45 < record["aux_loss"] < 1.0  # half of a balance that is 1 at best
        assert record["loss"] == record["ce"]
    assert all("aux_loss" not in record for record in records(base / "routed", "valid"))
    assert list((base / "routed").rglob("*aux_loss*.csv"))


def test_a_student_that_sees_padding_is_refused_before_anything_is_trained(base):
    FNetConfig(vocab_size=384, pad_token_id=1, **TINY).save_pretrained(base / "fnet")
    given = tiny_config(base / "padded", base / "corpus")
    given["model"] = {"name": str(base / "fnet"), "init": "random"}
    with pytest.raises(UserError, match="FNetForMaskedLM sees padding"):
        train(configuration.load(write_config(base / "padded.yaml", given)))
