"""The top-K kernel, on the CPU through Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from ki_ds.objective import reference, triton_topk  # noqa: E402
from ki_ds.objective.rows import TOPK_SEMANTICS, RowTask  # noqa: E402
from ki_ds.objective.triton_rows import Tiling  # noqa: E402
from tests.loss_cases import FORMS, Case, check, formed  # noqa: E402
from tests.loss_oracle import ADDED  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested by tests/gpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_topk, "DEFAULT_TILING", Tiling(num_warps=1, width=4))


@pytest.mark.parametrize("entry", [*TOPK_SEMANTICS, "linear_tail"])
@pytest.mark.parametrize("options", [{}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}])
def test_values_and_gradients_are_the_oracles(entry, options):
    check(Case(entry, backend="triton", std=3.0, num_rows=6, num_classes=150, width=160, **options))


@pytest.mark.parametrize("entry", ["linear_renormalise", "linear_tail", "linear_sampled"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("std", [3.0, 30.0])
def test_scaled_and_capped_logits_are_the_oracles(entry, form, std):
    sizes = {"num_rows": 6, "num_classes": 150, "width": 160, "teacher_width": 151}
    for options in ({}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}):
        check(formed(entry, form, backend="triton", std=std, **sizes, **options), value=3e-6, gradient=4e-6)


@pytest.mark.parametrize("added", ADDED, ids=str)
@pytest.mark.parametrize("entry", [*TOPK_SEMANTICS, "linear_tail"])
@pytest.mark.parametrize("options", [{}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}])
def test_added_terms_are_the_oracles(entry, options, added):
    sizes = {"num_rows": 6, "num_classes": 150, "width": 160}
    check(Case(entry, backend="triton", std=3.0, added=added, **sizes, **options))


def _rows(num_classes, width, num_entries, std):
    gen = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(4, w, generator=gen) * std for w in (width, num_classes))
    probs, ids = torch.softmax(teacher / 2, -1).topk(num_entries, -1)
    labels = torch.randint(0, num_classes, (4,), generator=gen)
    labels[0], labels[1] = ids[0, 0], -100  # a label that is an entry, and an ignored row
    return student, labels, ids, probs, torch.rand(4, generator=gen)


@pytest.mark.parametrize("semantics", TOPK_SEMANTICS)
@pytest.mark.parametrize(
    ("num_classes", "width", "num_entries"),
    [(700, 703, 10), (384, 384, 384), (100, 300, 1)],
    ids=["many_tiles", "all_classes", "one_entry"],
)
@pytest.mark.parametrize(("std", "cap"), [(1.0, None), (30.0, None), (3.0, 4.0), (30.0, 2.0)])
def test_the_kernel_is_the_reference(semantics, num_classes, width, num_entries, std, cap):
    student, labels, ids, probs, weights = _rows(num_classes, width, num_entries, std)
    task = RowTask(num_classes, alpha=0.4, semantics=semantics, cap=cap)
    before, in_place = student.clone(), student.clone()
    grad, wanted = torch.full_like(student, 7.0), torch.empty_like(student)
    terms = triton_topk.topk_rows(student, labels, ids, probs, task, row_scale_N=weights, grad_NV=grad)
    triton_topk.topk_rows(in_place, labels, ids, probs, task, row_scale_N=weights, grad_NV=in_place)
    want = reference.topk_rows(student, labels, ids, probs, task, row_scale_N=weights, grad_NV=wanted)
    assert torch.equal(student, before)
    assert torch.equal(grad, in_place)
    assert terms.teacher_ce_N is None
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(terms[:3], want[:3], strict=True))
    assert torch.allclose(grad, wanted, atol=1e-5)


def test_a_zero_alpha_on_the_device_never_reads_the_entries():
    student, labels, ids, probs, _ = _rows(200, 200, 5, 1.0)
    for semantics in TOPK_SEMANTICS:
        task = RowTask(200, alpha=torch.tensor(0.0), semantics=semantics)
        grad, wanted = torch.empty_like(student), torch.empty_like(student)
        terms = triton_topk.topk_rows(student, labels, ids, probs * float("nan"), task, grad_NV=grad)
        want = reference.dense_rows(student, labels, None, RowTask(200), grad_NV=wanted)
        assert torch.allclose(terms.ce_N, want.ce_N, atol=1e-5)
        assert torch.allclose(grad, wanted, atol=1e-6)
        assert torch.equal(terms.kl_N, torch.zeros(4))
