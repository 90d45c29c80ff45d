"""Bytes of a step: what DeepSpeed really hands to its collectives, and the arithmetic on top of it by hand."""

import json

import pytest

from ki_ds.planning.communication import Traffic, ranks_pay, step_seconds, traffic
from tests.tiny import ROOT, run_ranks, tiny_corpus

ALL_SMALL, NONE_SMALL = {}, {"stage3_param_persistence_threshold": 0}  # a tiny model's tensors all stay gathered
PARTS = {"use_multi_rank_bucket_allreduce": False}
FAR = {**NONE_SMALL, "stage3_max_reuse_distance": 40_000, "stage3_prefetch_bucket_size": 0}
CASES = {  # precision: (stage, changes of its ds_configs/, changes of the whole JSON, micro-steps)
    "fp32": [
        *[(0, {}, {}, 2), (1, {}, {}, 2), (1, PARTS, {}, 2), (2, {}, {}, 2)],
        *[(2, PARTS, {}, 2), (3, ALL_SMALL, {}, 2), (3, NONE_SMALL, {}, 1), (3, NONE_SMALL, {}, 2), (3, FAR, {}, 1)],
    ],
    "bf16": [
        *[(1, {}, {}, 1), (2, {}, {}, 2), (3, NONE_SMALL, {}, 2)],
        *[(stage, NONE_SMALL, {"communication_data_type": "fp32"}, 1) for stage in (1, 3)],
    ],
}


def settings_of(stage, zero, more):
    settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    if stage:
        settings["zero_optimization"] |= zero
    return settings | more


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_formulas_are_what_deepspeed_does(precision, tmp_path):
    """Two ranks over gloo, a step of each case: bytes by collective, but for scalars (1% with a short reuse)."""
    corpus, words = tiny_corpus(tmp_path / "corpus", num_documents=40), []
    for number, (stage, zero, more, micro_steps) in enumerate(CASES[precision]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(settings_of(stage, zero, more)))
        words.append(f"{path}:{micro_steps}")
    out = tmp_path / "out.json"
    results = run_ranks(["-m", "tests.workers.count_traffic", str(corpus), str(out), precision, *words], world=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-3000:]
    for case, found in zip(CASES[precision], json.loads(out.read_text()), strict=True):
        stage, zero, more, micro_steps = case
        parameters, element = found.pop("parameters"), 4 if precision == "fp32" else 2
        expected = traffic(
            settings_of(stage, zero, more),
            parameters,
            element_bytes=element,
            micro_steps=micro_steps,
            persistent=parameters if stage == 3 and not zero else 0,
        )
        real = Traffic(
            found.pop("all_reduce", 0),
            found.pop("reduce", 0) + found.pop("reduce_scatter_tensor", 0),
            found.pop("all_gather_into_tensor", 0),
        )
        assert not found, (case, found)
        scalars = 64
        assert real.all_reduce == pytest.approx(expected.all_reduce, abs=scalars), case
        assert real.reduce_scatter == expected.reduce_scatter, case
        assert real.all_gather == pytest.approx(expected.all_gather, rel=0.01 if zero is FAR else 0), case


def test_what_a_rank_sends():
    """An all-reduce is 2 P (n - 1) / n, each half of it P (n - 1) / n; ZeRO-3 with every use gathered 3 P."""
    assert Traffic(all_reduce=800.0).sent(8) == 2 * 800 * 7 / 8
    assert Traffic(reduce_scatter=800.0, all_gather=800.0).sent(8) == 2 * 800 * 7 / 8
    assert Traffic(all_reduce=800.0).sent(1) == 0
    every_use = {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}}
    assert traffic(every_use, 100, element_bytes=2).sent(4) == 3 * 200 * 3 / 4
    assert traffic({"zero_optimization": {"stage": 1}}, 100, element_bytes=2, micro_steps=4).sent(4) == 3 * 200 * 3 / 4
    assert traffic({"zero_optimization": {"stage": 2}}, 100, element_bytes=4, micro_steps=4).sent(2) == 9 * 400 / 2
    kept = {"zero_optimization": {"stage": 3}}
    assert traffic(kept, 400_000_000, element_bytes=2).passes == 2 * 800e6
    assert traffic(kept, 700_000_000, element_bytes=2).passes == 1.4e9 + 1.4e9 + 0.4e9  # 200M are gathered again


def test_links():
    """Of 64 ranks in 8 nodes: 7/8 of each pass in the node, 1/8 x 7/8 between nodes."""
    found = Traffic(all_reduce=64e9)
    assert found.sent_over(64) == (112e9, 14e9)
    assert sum(found.sent_over(64)) == found.sent(64) == 126e9
    assert found.sent_over(4) == (96e9, 0)
    assert found.sent_over(8) == (112e9, 0)
    assert found.seconds(64) == pytest.approx(112 / 450 + 14 / 50)
    assert found.seconds(8, nvlink=112e9) == 1.0
    with pytest.raises(AssertionError, match="12 ranks do not fill nodes of 8"):
        found.sent_over(12)


def test_bounds_of_a_step():
    assert step_seconds(3.0, 1.0) == (3.0, 4.0)
    assert step_seconds(1.0, 3.0) == (3.0, 4.0)


def test_when_ranks_of_their_own_pay():
    """By FLOPs alone never; with a student that need not compute its activations again, where the split is right."""
    for split in (1 / 8, 1 / 4, 0.2 / 1.2, 1 / 2):
        online, ranks = ranks_pay(teacher_share=0.2, head_share=0.0, split=split, slowdown=1.0)
        assert ranks >= online - 1e-12
    assert ranks_pay(teacher_share=0.2, head_share=0.0, split=0.25, slowdown=4 / 3) == pytest.approx(
        (1.5333, 4 / 3), 1e-3
    )
    online, ranks = ranks_pay(teacher_share=0.2, head_share=0.05, split=0.125, slowdown=4 / 3)
    assert ranks == pytest.approx(max(1.05 / 0.875, 0.15 / 0.125))
    assert ranks < online
    assert ranks_pay(teacher_share=0.2, head_share=0.0, split=0.05, slowdown=1.0)[1] == pytest.approx(4.0)
