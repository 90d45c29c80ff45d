from itertools import accumulate

import pytest
import torch

from ki_ds.objective import chunks, reference
from ki_ds.objective.chunks import Problem, compute, default_chunk_rows
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import Head, LogitForm

ALL = (True, True, True)


def _problem(dtype=torch.float32, **changes):
    gen = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(dtype)

    fields = {
        "student": Head(normal(11, 6), normal(23, 6), normal(23)),
        "labels_N": torch.randint(0, 20, (11,), generator=gen),
        "row_weights_N": None,
        "teacher": Head(normal(11, 3), normal(21, 3), None),
        "objective": Objective(20, alpha=0.5),
        "chunk_rows": 4,
        "backend": "torch",
        "wanted": ALL,
    }
    return Problem(**(fields | changes))


def test_the_default_chunk_fits_its_budget_and_is_even():
    logits = torch.zeros(1)
    rows = default_chunk_rows(8192, 50304, logits)
    assert rows % 128 == 0
    assert rows * 50304 * 4 <= chunks.CHUNK_BYTES_CPU + 128 * 50304 * 4
    assert default_chunk_rows(100, 50304, logits) == 100
    assert default_chunk_rows(0, 50304, logits) == 1


def test_unwanted_gradients_are_not_made():
    _, grads = compute(_problem(wanted=(False, True, False)))
    assert [g.numel() for g in grads] == [0, 23 * 6, 0]


def test_half_precision_weights_gather_their_gradient_in_float32():
    _, (hidden_ND, weight_VD, bias_V) = compute(_problem(torch.bfloat16))
    assert weight_VD.dtype == bias_V.dtype == torch.float32
    assert hidden_ND.dtype == torch.bfloat16


def test_ignored_rows_never_meet_a_head(monkeypatch):
    problem = _problem()
    problem.labels_N[3:9] = -100
    problem.student.hidden_ND[3:9] = float("nan")
    seen = []
    project = chunks.project
    monkeypatch.setattr(chunks, "project", lambda h, *a, out: seen.append(len(h)) or project(h, *a, out=out))
    sums, grads = compute(problem)
    assert int(sums.num_rows) == int(sums.teachers_T4[0, 2]) == 5
    assert sum(seen) == 10  # five rows of the student, five of the teacher
    assert torch.isfinite(sums.loss)
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][3:9].any()


def test_only_one_chunk_of_logits_exists(monkeypatch):
    sizes = []
    project = chunks.project
    monkeypatch.setattr(chunks, "project", lambda *a, out: sizes.append(out.shape) or project(*a, out=out))
    compute(_problem())
    assert max(rows for rows, _ in sizes) == 4


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_add_outer(first, dtype, scale):
    gen = torch.Generator().manual_seed(0)
    total = torch.full((5, 3), 7.0)
    grad, hidden = torch.randn(4, 5, generator=gen).to(dtype), torch.randn(4, 3, generator=gen).to(dtype)
    chunks.add_outer(total, grad, hidden, scale, first=first)
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
        problem = _problem(
            student=Head(hidden, weight, None, form),
            labels_N=labels,
            teacher=Head(torch.randn(num_rows, 4), torch.randn(5000, 4), None, form),
            objective=Objective(5000, alpha=0.5),
            chunk_rows=64,
            wanted=(True, True, False),
        )
        return _peak_bytes(lambda: compute(problem)) - 4 * hidden.numel()

    chunk = 4 * 64 * 5000
    assert peak(1024) <= peak(128) + chunk // 10
    assert peak(1024) < 4 * chunk  # both models' logits, and blocks of some rows
