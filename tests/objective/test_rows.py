import math

import pytest
import torch

from ki_ds.objective.rows import (
    RowTask,
    RowTerms,
    compute_dtype,
    grad_scale_for,
    mix_teachers,
    sum_rows,
)


def test_sums_put_alpha_tau_and_weights_into_the_loss_alone():
    terms = RowTerms(
        torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5]), torch.tensor([0.1, 0.2]), torch.tensor([3.0, 4.0])
    )
    sums = sum_rows(terms, RowTask(num_classes=5, alpha=0.25, tau=3.0), torch.tensor([1.0, 2.0]))
    assert float(sums.loss) == pytest.approx(0.75 * (1.5 + 5.0) + 0.25 * 9 * (0.1 + 0.4))
    assert float(sums.ce) == pytest.approx(3.0)
    assert float(sums.kl) == pytest.approx(0.3)
    assert float(sums.teacher_ce) == pytest.approx(7.0)


def test_without_a_teacher_the_kl_is_0():
    ce = torch.tensor([1.0, 2.0])
    sums = sum_rows(RowTerms(ce, ce, None), RowTask(num_classes=5), None)
    assert [float(x) for x in sums] == [3.0, 3.0, 0.0, 0.0]


def test_of_entries_the_teachers_own_cross_entropy_is_not_known():
    ce = torch.tensor([1.0, 2.0])
    assert math.isnan(float(sum_rows(RowTerms(ce, ce, kl_N=ce), RowTask(num_classes=5), None).teacher_ce))


def test_mixed_teachers_have_the_average_softmax():
    gen = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 9, generator=gen) for _ in range(2))
    mixed = mix_teachers([one, two[:, :8]], [1.0, 3.0], RowTask(num_classes=7, tau=2.0))
    want = 0.25 * torch.softmax(one[:, :7] / 2, -1) + 0.75 * torch.softmax(two[:, :7] / 2, -1)
    assert torch.allclose(torch.softmax(mixed / 2, -1), want, atol=1e-6)


def test_an_average_is_that_of_capped_logits():
    gen = torch.Generator().manual_seed(0)
    one, two = (4.0 * torch.randn(3, 9, generator=gen) for _ in range(2))
    task = RowTask(num_classes=9, tau=2.0)
    mixed = mix_teachers([one, two], [1.0, 3.0], task, [None, 2.0])
    assert torch.allclose(mixed, mix_teachers([one, 2.0 * torch.tanh(two / 2.0)], [1.0, 3.0], task), atol=1e-6)


def test_only_float64_is_computed_in_float64_and_only_float16_gradients_are_scaled():
    assert compute_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert compute_dtype(torch.zeros(1, dtype=dtype)) == torch.float32
    assert [grad_scale_for(d) for d in (torch.float32, torch.bfloat16, torch.float16)] == [1.0, 1.0, 128.0]


def test_a_teacher_is_left_out_only_where_the_host_knows_alpha_is_0():
    assert not RowTask(num_classes=2, alpha=0.0).uses_teacher()
    assert RowTask(num_classes=2, alpha=torch.tensor(0.0)).uses_teacher()
