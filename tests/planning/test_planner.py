import dataclasses

import pytest

from ki_ds.config import load, parse
from ki_ds.errors import UserError
from ki_ds.planning.planner import CPU_IMPORTS, CPU_STARTED, CPU_STARTED_ZERO, plan
from ki_ds.planning.sizes import Size, size_of_teacher
from tests.tiny import ROOT, inherit, records, run, tiny_corpus

CLASSES = 50_265
TEACHER = Size(10_000_000, 9_000_000, 6_000_000, 2, 128, 4, 512, 50_304)
BASE = ["--run_dir", "r", "--data.corpus", "c", "--data.seq_len", "64", "--model.num_layers", "2"]
BASE += ["--model.hidden_size", "48", "--model.ffn_size", "96", "--model.num_heads", "2"]
BASE += ["--train.micro_batch_size", "4", "--train.global_batch_size", "32", "--train.num_steps", "100"]
TAUGHT = ["--teacher.path", "t", "--inherit.schedule", "linear", "--inherit.steps", "40"]


def planned(*arguments, ranks=2, **options):
    config = parse([*BASE, *arguments])
    options.setdefault("teachers", [TEACHER] * len(config.all_teachers))
    return plan(config, num_ranks=ranks, num_classes=CLASSES, **options)


def zero(name):
    return ["--engine.ds_config", str(ROOT / "ds_configs" / f"{name}.json")]


BF16 = ["--engine.precision", "bf16"]


@pytest.mark.parametrize(
    ("name", "arguments", "weights", "states"),
    [
        ("zero0", [], 4, 8),
        ("zero1", [], 4, 12 / 4),
        ("zero1", BF16, 2, 12 / 4),
        ("zero2", BF16, 2, 12 / 4),
        ("zero3", [], 4 / 4, 8 / 4),
        ("zero3", BF16, 2 / 4, 12 / 4),
        ("zero2_offload", BF16, 2, 0),
    ],
)
def test_states_by_zero_stage(name, arguments, weights, states):
    found = planned(*zero(name), *arguments, ranks=4, on_gpu=True)
    gathered = (2 if arguments else 4) if name == "zero3" and found.memory_moment != "update" else 0
    assert found.memory["weights"] == pytest.approx((weights + gathered) * found.parameters, rel=1e-4)
    assert found.memory.get("optimizer states", 0) == pytest.approx(states * found.parameters, rel=1e-4)
    if "offload" in name:
        assert found.host_memory["optimizer states"] == pytest.approx(12 / 4 * found.parameters, rel=1e-4)


def test_zero_2_in_half_precision_is_what_deepspeed_estimates():
    """Its estimator counts 2 + 18 / n bytes a parameter: ours at the update, border and framework left out."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    found = planned(*zero("zero2"), *BF16, ranks=1, on_gpu=True)
    _, expected = estimate_zero2_model_states_mem_needs(found.parameters, num_gpus_per_node=1, cpu_offload=False)
    # one rank: its partition is everything, once in bfloat16 as reduced and once flattened
    assert found.moments["update"] == expected + 2 * found.parameters


def test_the_worst_moment_is_the_sum_of_its_parts():
    found = planned(*TAUGHT)
    assert found.total_memory == sum(found.memory.values()) == max(found.moments.values())
    assert found.memory_moment == "forward and loss"
    assert found.memory["teacher weights"] == 4 * TEACHER.num_parameters  # fp32 on a CPU
    assert planned(*TAUGHT, on_gpu=True).memory["teacher weights"] == 2 * TEACHER.num_parameters


@pytest.mark.parametrize(
    ("name", "arguments", "weights", "states"),
    [("zero0", [], 4, 8), ("zero1", [], 4, 12 / 4), ("zero3", BF16, 2, 12 / 4), ("zero2_offload", BF16, 2, 12 / 4)],
)
def test_a_save_in_the_background_has_its_copy_in_host_memory(name, arguments, weights, states):
    for on_gpu in (True, False):
        plans = [
            planned(*zero(name), *arguments, "--train.save_in_background", answer, ranks=4, on_gpu=on_gpu)
            for answer in ("false", "true")
        ]
        copied = (weights + states) * plans[0].parameters
        if on_gpu:
            assert plans[1].host_memory.pop("checkpoint") == pytest.approx(copied, rel=1e-4)
            assert plans[1] == plans[0]
        else:
            assert plans[1].total_memory - plans[0].total_memory == pytest.approx(copied, rel=1e-4)


def test_a_cpus_framework_is_told_apart():
    assert planned(*zero("zero0")).memory["framework"] == CPU_IMPORTS + CPU_STARTED
    assert planned().memory["framework"] == CPU_IMPORTS + CPU_STARTED_ZERO
    assert "framework" not in planned(on_gpu=True).memory


def test_the_loss_has_one_chunk_of_logits():
    small, large = (planned("--loss.chunk_rows", rows).moments for rows in ("8", "16"))
    assert large["forward and loss"] - small["forward and loss"] == 4 * 8 * 50_304  # blocks are as large
    assert large["backward, first layer"] == small["backward, first layer"]
    taught = planned(*TAUGHT, "--loss.chunk_rows", "8").moments, planned(*TAUGHT, "--loss.chunk_rows", "16").moments
    assert taught[1]["forward and loss"] - taught[0]["forward and loss"] == 2 * 4 * 8 * 50_304


def test_a_gpu_has_its_buckets_whole():
    found = planned(*zero("zero2"), *BF16, on_gpu=True)
    assert found.memory["communication"] >= 2 * 2 * 2e8  # two of them in bfloat16
    assert planned(*zero("zero2"), *BF16).total_memory < found.total_memory


def test_placements_move_the_teacher():
    online, ranks = planned(*TAUGHT), planned(*TAUGHT, "--teacher.placement", "ranks", ranks=3)
    assert ranks.num_teacher_ranks == 1
    assert ranks.memory["teacher weights"] == 4 * TEACHER.vocab_size * TEACHER.hidden_size
    assert ranks.teacher_memory["teacher weights"] == online.memory["teacher weights"]
    topk = dataclasses.replace(TEACHER, hidden_size=0)
    cached = planned(*TAUGHT, "--teacher.placement", "cache", teachers=[topk])
    assert "teacher weights" not in cached.memory
    overlap = planned(*TAUGHT, "--teacher.placement", "overlap")
    assert overlap.total_memory > online.total_memory


def test_work_and_time():
    found = planned(*TAUGHT, peak_flops=1e12, mfu=0.5)
    tokens = 32 * 64
    assert found.num_tokens == 100 * tokens
    assert found.student_flops == 100 * 6.0 * found.dense_parameters * tokens
    assert found.teacher_flops == 40 * 2.0 * TEACHER.dense_parameters * tokens
    assert found.seconds == pytest.approx(found.flops / (2 * 0.5e12))
    assert planned(*TAUGHT).seconds is None


def test_auto_is_a_bound():
    found = planned("--teacher.path", "t", "--inherit.schedule", "auto")
    assert found.taught_is_bound
    assert found.num_taught_steps == 100
    assert any("upper bounds" in note for note in found.notes)
    assert not planned(*TAUGHT).taught_is_bound


def test_the_best_placement_has_a_reason():
    alone = planned(*TAUGHT)
    assert alone.best_placement == "online"
    assert "%" in alone.reason
    shared = planned(*TAUGHT, num_runs=20)
    assert shared.best_placement == "cache"
    assert "20 runs" in shared.reason
    assert planned().best_placement == "none"
    costs = {placement.name: placement.relative_cost for placement in shared.placements}
    share = alone.teacher_flops / alone.student_flops
    assert costs["online"] == pytest.approx(1 + share)
    assert costs["cache"] == pytest.approx(1 + share / 20)
    assert costs["ranks"] >= costs["online"]


def test_disk():
    found = planned(*TAUGHT, "--train.save_every", "10", "--train.keep_checkpoints", "2")
    assert found.checkpoint_disk == (4 + 12 + 4) * found.parameters
    assert found.disk == 3 * found.checkpoint_disk + 2 * 4 * found.parameters
    rows = 40 * 32 * 64 * 0.15
    assert found.topk_cache_disk == pytest.approx(rows * 40 + 40 * 32 * 20, rel=1e-6)
    assert found.hidden_cache_disk == pytest.approx(rows * 2 * 128 + 40 * 32 * 20, rel=1e-6)
    assert planned("--train.save_every", "100").disk < found.disk


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([], {"ranks": 3}, "x 3 ranks"),
        ([*TAUGHT, "--teacher.placement", "ranks"], {"ranks": 1}, "leave no student"),
        (TAUGHT, {"teachers": []}, "0 sizes of teachers"),
        ([], {"mfu": 1.5}, "--mfu 1.5"),
        ([], {"peak_flops": -1e12}, "--peak_tflops -1"),
        ([], {"num_runs": 0}, "--num_runs 0"),
        (["--engine.precision", "fp16", *zero("zero0")], {}, "fp16 with ZeRO stage 0"),
    ],
)
def test_what_the_run_would_refuse_is_refused(arguments, options, words):
    with pytest.raises(UserError, match=words):
        planned(*arguments, **options)


def test_flops_are_those_of_a_finished_runs_metrics(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus")
    groups = {"data": {"break_mode": "none"}, "train": {"num_steps": 6, "eval_every": 6, "save_every": 6}}
    run(tmp_path / "causal_teacher", corpus, task="causal", **groups, model={"hidden_size": 16})
    folder = inherit(tmp_path, "student", "causal", **groups)
    config = load(folder / "config.yaml")
    teacher = size_of_teacher(str(tmp_path / "causal_teacher"), "causal", 320)
    found = plan(config, num_ranks=1, num_classes=320, teachers=[teacher])
    last = records(folder, "train")[-1]
    assert found.num_tokens == last["tokens"]
    assert found.student_flops == last["student_flops"]
    assert found.teacher_flops == last["teacher_flops"] > 0


def test_bytes_sent_follow_stage_ranks_and_micro_steps():
    """Global batch 32 in micro-batches of 4: 4 micro-steps of 2 ranks; a teacher's rank sends no gradients."""
    one = planned(*zero("zero1"), *BF16)
    assert one.bytes_sent == 3 * 2 * one.parameters / 2
    assert planned(*zero("zero2"), *BF16).bytes_sent == 9 * 2 * one.parameters / 2
    assert planned(*zero("zero3"), *BF16).bytes_sent == 8 * 2 * one.parameters / 2
    assert planned(*zero("zero0"), ranks=4).bytes_sent == 2 * 4 * one.parameters * 3 / 4
    assert planned(*zero("zero1"), ranks=1).bytes_sent == 0
    teaching = [*TAUGHT, "--teacher.placement", "ranks", "--teacher.num_ranks", "1"]
    assert planned(*zero("zero1"), *BF16, *teaching, ranks=3).bytes_sent == one.bytes_sent
