from itertools import accumulate

import pytest
import torch

from ki_ds.objective import linear, reference
from ki_ds.objective.linear import Head, Problem, Wanted, default_chunk_rows, linear_rows
from ki_ds.objective.rows import LogitForm, RowTask


def _problem(dtype=torch.float32, chunk_rows=4, **changes):
    gen = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    fields = {
        "hidden_ND": normal(11, 6),
        "weight_VD": normal(23, 6),
        "bias_V": normal(23),
        "form": LogitForm(),
        "labels_N": torch.randint(0, 20, (11,), generator=gen),
        "row_weights_N": None,
        "heads": [Head(normal(11, 3), normal(21, 3), None, None)],
        "shares": [1.0],
        "topk": None,
        "task": RowTask(num_classes=20, alpha=0.5),
        "chunk_rows": chunk_rows,
        "backend": "torch",
    }
    return Problem(**(fields | changes))


ALL = Wanted(True, True, True)


def test_the_default_chunk_fits_its_budget_and_is_even():
    logits = torch.zeros(1)
    rows = default_chunk_rows(8192, 50304, logits)
    assert rows % 128 == 0
    assert rows * 50304 * 4 <= linear.CHUNK_BYTES_CPU + 128 * 50304 * 4
    assert default_chunk_rows(100, 50304, logits) == 100
    assert default_chunk_rows(0, 50304, logits) == 1


def test_unwanted_gradients_are_not_made():
    _, grads = linear_rows(_problem(), Wanted(False, True, False))
    assert [g.numel() for g in grads] == [0, 23 * 6, 0]


def test_half_precision_weights_gather_their_gradient_in_float32():
    _, grads = linear_rows(_problem(torch.bfloat16), ALL)
    assert grads.weight_VD.dtype == grads.bias_V.dtype == torch.float32
    assert grads.hidden_ND.dtype == torch.bfloat16


def test_ignored_rows_never_meet_a_head(monkeypatch):
    problem = _problem()
    problem.labels_N[3:9] = -100
    problem.hidden_ND[3:9] = float("nan")
    seen = []
    project = linear.project
    monkeypatch.setattr(linear, "project", lambda h, *a, out: seen.append(len(h)) or project(h, *a, out=out))
    sums, grads = linear_rows(problem, ALL)
    assert int(sums.num_rows) == int(sums.teachers_T4[0, 2]) == 5
    assert sum(seen) == 10  # five rows of the student, five of the teacher
    assert torch.isfinite(sums.loss)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads.hidden_ND[3:9].any()


def test_only_one_chunk_of_logits_exists(monkeypatch):
    sizes = []
    project = linear.project
    monkeypatch.setattr(linear, "project", lambda *a, out: sizes.append(out.shape) or project(*a, out=out))
    linear_rows(_problem(), ALL)
    assert max(rows for rows, _ in sizes) == 4


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_add_outer(first, dtype, scale):
    gen = torch.Generator().manual_seed(0)
    total = torch.full((5, 3), 7.0)
    grad, hidden = torch.randn(4, 5, generator=gen).to(dtype), torch.randn(4, 3, generator=gen).to(dtype)
    linear.add_outer(total, grad, hidden, scale, first=first)
    want = scale * grad.float().T @ hidden.float() + (0.0 if first else 7.0)
    assert torch.allclose(total, want, atol=0.05)


def _peak_bytes(function):
    """Peak of the tensors' memory during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.5, 30.0)])
def test_memory_does_not_grow_with_the_rows_beyond_a_chunk(form, monkeypatch):
    """Only the gradient of the hidden states does, which the caller wants. A form takes no chunk more."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS_CPU", 1 << 15)

    def peak(num_rows):
        hidden, weight = torch.randn(num_rows, 8), torch.randn(5000, 8)
        labels = torch.randint(0, 5000, (num_rows,))
        heads = [Head(torch.randn(num_rows, 4), torch.randn(5000, 4), None, None, form)]
        problem = _problem(
            hidden_ND=hidden, weight_VD=weight, bias_V=None, labels_N=labels, heads=heads, chunk_rows=64, form=form,
            task=RowTask(num_classes=5000, alpha=0.5),
        )  # fmt: skip
        return _peak_bytes(lambda: linear_rows(problem, Wanted(True, True, False))) - 4 * hidden.numel()

    chunk = 4 * 64 * 5000
    assert peak(1024) <= peak(128) + chunk // 10
    assert peak(1024) < 4 * chunk  # both models' logits, and blocks of some rows
