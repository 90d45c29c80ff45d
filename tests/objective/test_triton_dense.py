"""The dense kernel, on the CPU through Triton's interpreter, which truncates bf16 stores."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from ki_ds.objective import reference, triton_dense  # noqa: E402
from ki_ds.objective.rows import RowTask  # noqa: E402
from ki_ds.objective.triton_rows import Tiling  # noqa: E402
from tests.loss_cases import FORMS, Case, check, formed  # noqa: E402
from tests.loss_oracle import ADDED  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested by tests/gpu")
SMALL = Tiling(num_warps=1, width=4)  # tiles of 128 columns


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(triton_dense, "DEFAULT_TILING", SMALL)


@pytest.mark.parametrize("entry", ["linear_label", "linear_dense", "linear_averaged", "linear_routed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("std", [3.0, 30.0])
def test_scaled_and_capped_logits_are_the_oracles(entry, form, std):
    sizes = {"num_rows": 6, "num_classes": 150, "width": 160, "teacher_width": 151}
    for options in ({}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}):
        check(formed(entry, form, backend="triton", std=std, **sizes, **options), value=3e-6, gradient=4e-6)


@pytest.mark.parametrize("added", ADDED, ids=str)
@pytest.mark.parametrize("entry", ["label", "dense", "averaged", "linear_dense", "linear_routed"])
@pytest.mark.parametrize("options", [{}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}])
def test_added_terms_are_the_oracles(entry, options, added):
    sizes = {"num_rows": 6, "num_classes": 150, "width": 160, "teacher_width": 151}
    check(Case(entry, backend="triton", std=3.0, added=added, **sizes, **options))


def _rows(num_classes, widths, dtype=torch.float32, std=3.0):
    gen = torch.Generator().manual_seed(4)
    student, teacher = ((torch.randn(4, w, generator=gen) * std).to(dtype) for w in widths)
    labels = torch.randint(0, num_classes, (4,), generator=gen)
    labels[1], labels[3] = -100, num_classes - 1
    return student, teacher, labels, torch.rand(4, generator=gen)


@pytest.mark.parametrize("entry", ["label", "dense", "averaged", "linear_dense", "linear_routed"])
@pytest.mark.parametrize("options", [{}, {"tau": 1.3, "smoothing": 0.1, "weighted": True, "alpha_as_tensor": True}])
def test_values_and_gradients_are_the_oracles(entry, options):
    check(Case(entry, backend="triton", std=3.0, num_rows=6, num_classes=150, width=160, teacher_width=151, **options))


@pytest.mark.parametrize(
    ("num_classes", "widths"),
    [(700, (703, 720)), (384, (384, 384)), (100, (300, 100)), (128, (600, 128))],
    ids=["many_tiles", "whole_tiles", "less_than_a_tile", "padding_of_many_tiles"],
)
@pytest.mark.parametrize(
    ("dtype", "ulp"), [(torch.float32, 1e-6), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)], ids=str
)
@pytest.mark.parametrize("cap", [None, 4.0])
def test_any_number_of_tiles_in_place_or_not(num_classes, widths, dtype, ulp, cap):
    student, teacher, labels, weights = _rows(num_classes, widths, dtype)
    task = RowTask(num_classes, alpha=0.4, cap=cap, teacher_cap=cap)
    grad, wanted, in_place = torch.full_like(student, 7.0), torch.empty_like(student), student.clone()
    terms = triton_dense.dense_rows(student, labels, teacher, task, row_scale_N=weights, grad_NV=grad)
    triton_dense.dense_rows(in_place, labels, teacher, task, row_scale_N=weights, grad_NV=in_place)
    want = reference.dense_rows(student, labels, teacher, task, row_scale_N=weights, grad_NV=wanted)
    assert torch.equal(grad, in_place)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(terms[:4], want[:4], strict=True))
    assert torch.allclose(grad.float(), wanted.float(), rtol=ulp, atol=1e-6)
    assert not grad[:, num_classes:].any()
    assert not grad[1].any()


def test_a_zero_alpha_on_the_device_never_reads_the_teacher():
    student, teacher, labels, _ = _rows(200, (200, 200))
    grad, wanted = torch.empty_like(student), torch.empty_like(student)
    task = RowTask(200, alpha=torch.tensor(0.0))
    terms = triton_dense.dense_rows(student, labels, teacher * float("nan"), task, grad_NV=grad)
    want = reference.dense_rows(student, labels, None, RowTask(200), grad_NV=wanted)
    assert torch.allclose(terms.ce_N, want.ce_N, atol=1e-5)
    assert not terms.kl_N.any()
    assert torch.allclose(grad, wanted, atol=1e-6)


def test_a_label_that_is_no_class_shows_as_nan():
    student, teacher, labels, _ = _rows(200, (200, 200))
    labels[0] = 200
    terms = triton_dense.dense_rows(student, labels, teacher, RowTask(200, alpha=0.5))
    assert torch.isnan(terms.ce_N).tolist() == [True, False, False, False]


def test_spread_logits_do_not_overflow():
    student, teacher, labels, _ = _rows(300, (300, 300), std=300.0)
    grad, wanted = torch.empty_like(student), torch.empty(4, 300, dtype=torch.float64)
    task = RowTask(300, alpha=0.5)
    terms = triton_dense.dense_rows(student, labels, teacher, task, grad_NV=grad)
    want = reference.dense_rows(student.double(), labels, teacher.double(), task, grad_NV=wanted)
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-4) for a, b in zip(terms[:4], want[:4], strict=True))
    assert torch.allclose(grad.double(), wanted, atol=1e-4)


def test_no_rows():
    student, teacher, labels, _ = _rows(200, (200, 200))
    *terms, added = triton_dense.dense_rows(student[:0], labels[:0], teacher[:0], RowTask(200, alpha=0.5))
    assert [t.shape for t in terms] == [(0,)] * 4
    assert added is None
