"""What a signal of several teachers comes to: routed parts of any kind are the losses of their rows, gradients too."""

import dataclasses

import pytest
import torch

from ki_ds.loss import linear_inheritance_loss, linear_topk_inheritance_loss
from ki_ds.objective.loss import loss
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import PLAIN, Average, Head, LogitForm, Logits, Part, Routed, Sparse

N, D, V = 9, 6, 12
ALPHA, TAU = 0.6, 2.0


@pytest.fixture
def student():
    """Hidden states and a head that want gradients, and labels; in float64."""
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), torch.randint(0, V, (N,))


def hidden_signal(rows, width, seed, form=PLAIN):
    draw = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD = (torch.randn(n, width, dtype=torch.float64, generator=draw) for n in (rows, V))
    return Head(hidden_ND, weight_VD, torch.randn(V, dtype=torch.float64, generator=draw), form)


def entries_signal(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    probs_NV = torch.randn(rows, V, dtype=torch.float64, generator=draw).softmax(-1)
    top = probs_NV.topk(4)
    return Sparse(top.indices, top.values, "tail")


A, B = torch.tensor([7, 0, 3]), torch.tensor([2, 8])
KINDS = {
    "hidden": (hidden_signal(3, 4, 1), hidden_signal(2, 8, 2)),
    "entries": (entries_signal(3, 1), entries_signal(2, 2)),
    "both": (hidden_signal(3, 4, 1), entries_signal(2, 2)),
    "formed": (hidden_signal(3, 4, 1, LogitForm(0.5, 2.0)), hidden_signal(2, 8, 2, LogitForm(cap=3.0))),
    "formed_and_entries": (hidden_signal(3, 4, 1, LogitForm(0.5, 2.0)), entries_signal(2, 2)),
}


def loss_of(signal, student, alpha, form=PLAIN):
    hidden_ND, weight_VD, labels_N = student
    return loss(Head(hidden_ND, weight_VD, None, form), labels_N, signal, Objective(alpha=alpha, tau=TAU))


def alone(signal, student, rows, alpha):
    """The loss of some rows with one teacher or none, straight from `ki_ds.objective.loss`."""
    hidden_ND, weight_VD, labels_N = student
    given = (hidden_ND[rows], weight_VD, labels_N[rows])
    match signal:
        case None:
            return linear_inheritance_loss(*given, tau=TAU)
        case Head(h, w, b, form):
            told = {"teacher_hidden": h, "teacher_weight": w, "teacher_bias": b, "teacher_form": form}
            return linear_inheritance_loss(*given, **told, alpha=alpha, tau=TAU)
        case Sparse(ids, probs, semantics):
            return linear_topk_inheritance_loss(
                *given, topk_ids=ids, topk_probs=probs, semantics=semantics, alpha=alpha, tau=TAU
            )


def gradients(student, loss):
    return torch.autograd.grad(loss, student[:2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_routed_signal_is_the_sum_of_its_parts(student, kind, as_tensor):
    """Of three teachers the second has no row here; four rows have no teacher."""
    first, second = KINDS[kind]
    signal = Routed((Part(0, first, A, 30), Part(2, second, B, 20)), 3)
    alpha = torch.tensor(ALPHA) if as_tensor else ALPHA
    found = loss_of(signal, student, alpha)
    free = torch.tensor([n for n in range(N) if n not in {*A.tolist(), *B.tolist()}])
    parts = [alone(s, student, rows, alpha) for s, rows in ((first, A), (second, B), (None, free))]
    for name in ("loss_sum", "ce_sum", "kl_sum"):
        expected = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(found, name), expected, check_dtype=False)
    assert int(found.num_rows) == N
    expected = torch.stack([parts[0].teachers[0], torch.zeros(4), parts[1].teachers[0]])
    torch.testing.assert_close(found.teachers, expected, check_dtype=False, equal_nan=True)
    ours = gradients(student, found.loss_sum)
    theirs = gradients(student, sum(part.loss_sum for part in parts))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_rows_that_nobody_teaches_are_plain_self_learning(student):
    found = loss_of(Routed((), 2), student, 1.0)
    expected = loss_of(None, student, 0.0)
    assert torch.equal(found.loss_sum, expected.loss_sum)
    assert found.teachers.tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_taught_leaves_no_rest(student, kind):
    first, second = KINDS[kind]
    short = tuple(tensor[:5] if n != 1 else tensor for n, tensor in enumerate(student))
    signal = Routed((Part(0, first, torch.tensor([4, 0, 2]), 1), Part(1, second, torch.tensor([1, 3]), 1)), 2)
    found = loss_of(signal, short, 1.0)
    assert int(found.num_rows) == 5
    torch.testing.assert_close(float(found.loss_sum.detach()), float(found.kl_sum) * TAU**2)


def test_without_alpha_no_teacher_is_counted(student):
    for first, second in KINDS.values():
        found = loss_of(Routed((Part(0, first, A, 1), Part(1, second, B, 1)), 2), student, 0.0)
        expected = loss_of(None, student, 0.0)
        torch.testing.assert_close(found.loss_sum, expected.loss_sum)
        assert found.teachers.abs().sum() == 0


def test_an_average_of_one_kind_is_that_teacher(student):
    one = hidden_signal(N, 4, 3)
    found = loss_of(Average((one, one), (1.0, 9.0)), student, ALPHA)
    torch.testing.assert_close(found.loss_sum, loss_of(one, student, ALPHA).loss_sum)


def test_each_teachers_logits_have_their_form(student):
    """A head's form is the same as logits made by hand: here those of an identity as the head."""
    forms = LogitForm(0.5, 2.0), LogitForm(-1.5)
    formed = [hidden_signal(N, 4, seed, form) for seed, form in enumerate(forms)]
    logits = [
        Head(one.form.logits(one.hidden_ND, one.weight_VD, one.bias_V), torch.eye(V, dtype=torch.float64), None)
        for one in formed
    ]
    for ours, by_hand in (
        (formed[0], logits[0]),
        (Average(tuple(formed), (1.0, 9.0)), Average(tuple(logits), (1.0, 9.0))),
    ):
        found, expected = (loss_of(signal, student, ALPHA, LogitForm(0.3, 4.0)) for signal in (ours, by_hand))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(student, found.loss_sum), gradients(student, expected.loss_sum))
    assert float(found.kl_sum) != pytest.approx(float(loss_of(ours, student, ALPHA).kl_sum))


def test_what_is_no_signal(student):
    with pytest.raises(AssertionError):
        loss_of("nothing", student, 0.5)  # type: ignore[arg-type]


SIGNALS = [Logits(torch.zeros(2, 3)), *KINDS["both"], Part(0, KINDS["hidden"][0], A), Routed((), 2), Average((), ())]


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_signal_cannot_be_changed(signal):
    for field in dataclasses.fields(signal):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(signal, field.name, torch.ones(1))


@pytest.mark.parametrize("form", [LogitForm(), LogitForm(0.1), LogitForm(cap=30.0), LogitForm(-3.0, 0.3)])
def test_a_form_is_the_same_behind_its_numbers_and_makes_logits(form):
    assert LogitForm.of_numbers(*form.numbers) == form
    gen = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=gen) for shape in ((3, 4), (9, 4), (9,)))
    for given in (bias, None):
        want = form.scale * (hidden.double() @ weight.double().T) + (0.0 if given is None else given.double())
        want = want if form.cap is None else form.cap * torch.tanh(want / form.cap)
        torch.testing.assert_close(form.logits(hidden, weight, given).double(), want, rtol=1e-6, atol=1e-6)
    half = form.logits(hidden.bfloat16(), weight.bfloat16(), None)
    assert half.dtype == torch.float32
    if form == LogitForm():
        assert torch.equal(half, (hidden.bfloat16() @ weight.bfloat16().T).float())
