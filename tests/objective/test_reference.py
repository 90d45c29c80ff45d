import pytest
import torch

from ki_ds.objective import reference
from ki_ds.objective.rows import RowTask


def _rows(num_rows=7, width=19, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1)
    student = torch.randn(num_rows, width, generator=gen).to(dtype)
    teacher = torch.randn(num_rows, width + 2, generator=gen).to(dtype)
    labels = torch.randint(0, 17, (num_rows,), generator=gen)
    labels[2] = -100
    return student, teacher, labels


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_writing_in_place_change_nothing(monkeypatch, tau, dtype):
    student, teacher, labels = _rows(dtype=dtype)
    task, results = RowTask(num_classes=17, alpha=0.4, tau=tau), []
    for budget, in_place in ((1 << 20, False), (17, False), (40, True)):
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", budget)
        logits = student.clone()
        grad = logits if in_place else torch.full_like(logits, 9.0)
        terms = reference.dense_rows(logits, labels, teacher, task, grad_NV=grad)
        results.append((grad, terms.ce_N, terms.kl_N))
        assert in_place or torch.equal(logits, student)
    for result in results[1:]:
        assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(result, results[0], strict=True))


def test_without_a_gradient_the_terms_are_the_same():
    student, teacher, labels = _rows()
    for task in (RowTask(num_classes=17, alpha=0.4), RowTask(num_classes=17, alpha=0.4, tau=1.5)):
        with_grad = reference.dense_rows(student, labels, teacher, task, grad_NV=torch.empty_like(student))
        without = reference.dense_rows(student, labels, teacher, task)
        assert all(torch.equal(a, b) for a, b in zip(with_grad[:4], without[:4], strict=True))


def test_ignored_rows_are_0_even_if_they_hold_nan():
    student, teacher, labels = _rows()
    student[2], teacher[2] = float("nan"), float("nan")
    grad = torch.full_like(student, 9.0)
    terms = reference.dense_rows(student, labels, teacher, RowTask(num_classes=17, alpha=0.4), grad_NV=grad)
    assert torch.isfinite(grad).all()
    assert not grad[2].any()
    assert float(terms.ce_N[2]) == float(terms.kl_N[2]) == 0.0


def test_no_block_holds_more_than_its_budget(monkeypatch):
    """A row wider than the budget is a block of its own; none is skipped."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", 10)
    student, _, labels = _rows()
    parts = reference._blocks(student, RowTask(num_classes=17))
    assert [(p.start, p.stop) for p in parts] == [(i, i + 1) for i in range(7)]
    assert reference._blocks(student[:0], RowTask(num_classes=17)) == []
    assert labels.shape == (7,)
