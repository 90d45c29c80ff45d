"""ZeRO stage x precision x task x teacher, two ranks: every combination trains as stage 0 in float32 does.

Losses of three updates (so that clipping, accumulation and the optimizer count) and the whole first gradient. In fp32
the stages differ by the order of their sums only; bf16 rounds weights, activations and gradients to 8 bits.
"""

import pytest
import torch

from ki_ds.engine import student as engine
from tests.tiny import run_ranks, tiny_corpus

# fp32: largest difference of any gradient's element, and of a loss; halves: relative to the gradient's norm
GRADIENT = {"fp32": 1e-6, "bf16": 0.03, "fp16": 0.01}
LOSS = {"fp32": 2e-5, "bf16": 0.02, "fp16": 0.01}
PAIRS = [f"{task}/{teacher}" for task in ("mlm", "causal") for teacher in ("ki", "self")]
VARIANTS = ["clipped", "accumulated", "recomputed", "compiled"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(precision, cases): what each case came to, on two ranks of one job."""
    folder = tmp_path_factory.mktemp("matrix")
    corpus = tiny_corpus(folder / "corpus", num_documents=40)

    def measure(precision, cases):
        out = folder / f"{precision}_{len(list(folder.iterdir()))}.pt"
        results = run_ranks(
            ["-m", "tests.workers.matrix", str(corpus), str(out), precision, *cases], world=2, timeout=1500
        )
        assert [r.returncode for r in results] == [0, 0], results[0].stderr[-3000:]
        return torch.load(out)

    return measure


def compare(found, expected, precision):
    """The largest difference of (gradient, loss) between two cases, each held below its tolerance."""
    gradients, reference = found["gradients"], expected["gradients"]
    assert gradients.keys() == reference.keys()
    differences = [(gradients[name] - reference[name]).abs().max().item() for name in reference]
    if precision == "fp32":
        gradient = max(differences)
    else:
        both = [torch.cat([each[name].flatten() for name in reference]) for each in (gradients, reference)]
        gradient = ((both[0] - both[1]).norm() / both[1].norm()).item()
    losses = list(zip(found["losses"], expected["losses"], strict=True))
    loss = max(abs(a - b) for a, b in losses)
    assert gradient < GRADIENT[precision], (gradient, differences)
    assert loss < LOSS[precision], losses
    assert expected["losses"][-1] < expected["losses"][0] - 0.01  # the updates have been made
    return gradient, loss


def held(measured, precision, cases, record_property):
    """Compare all cases with stage 0 in fp32; what stage 0 came to."""
    stage_0 = sorted({as_stage_0(case) for case in cases})
    found = measured("fp32", [*stage_0, *cases] if precision == "fp32" else stage_0)
    expected = {case: found[case] for case in stage_0}
    found = found if precision == "fp32" else measured(precision, cases)
    worst = [compare(found[case], expected[as_stage_0(case)], precision) for case in cases]
    gradient, loss = (max(values) for values in zip(*worst, strict=True))
    record_property("figure", f"{precision}, {len(cases)} combinations: gradient {gradient:.1e}, loss {loss:.1e}")
    return expected


def as_stage_0(case):
    """The same case at stage 0; of what changes no figure, the plain one."""
    task, teacher, _, *variant = case.split("/")
    return "/".join([task, teacher, "0", *(variant if variant == ["clipped"] else [])])


def test_some_combinations(measured, record_property):
    cases = ["causal/ki/3", "causal/ki/1/clipped", "mlm/self/2/accumulated"]
    reference = held(measured, "fp32", cases, record_property)
    plain, clipped = (reference[f"causal/ki/0{variant}"]["losses"] for variant in ("", "/clipped"))
    assert plain[0] == clipped[0]
    assert abs(plain[-1] - clipped[-1]) > 1e-3  # else a clipping that is left out would not be seen


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_combination(precision, measured, record_property):
    if not engine.supports(precision):
        pytest.skip(f"DeepSpeed has no {precision} on this device")
    stages = ["1", "2", "3"]
    cases = [f"{pair}/{stage}" for pair in PAIRS for stage in stages]
    cases += [f"{pair}/{stage}/{variant}" for pair in PAIRS[:2] for stage in stages for variant in VARIANTS]
    cases += [f"{pair}/{stage}_offload" for pair in PAIRS for stage in ("2", "3")]
    held(measured, precision, cases, record_property)
