"""The public loss functions against the oracle, their invariances, and how they behave inside autograd."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from ki_ds.errors import UserError
from ki_ds.loss import (
    inheritance_loss,
    linear_cross_entropy,
    linear_inheritance_loss,
    linear_topk_inheritance_loss,
    multi_teacher_loss,
    topk_inheritance_loss,
)
from ki_ds.objective.types import LogitForm
from tests.loss_cases import ENTRIES, FORMS, Case, check, formed, relative
from tests.loss_oracle import ADDED, Oracle

SHARED = Path(os.environ.get("KI_DS_SHARED", Path(__file__).parents[3] / "shared"))
RELEASED = SHARED / "fairseq"


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("std", [1.0, 3.0, 30.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": 1.0, "alpha": 1.0, "bias": False},
        {"tau": 3.1, "smoothing": 0.2, "weighted": True, "alpha_as_tensor": True},
    ],
    ids=["plain", "tau1", "all_options"],
)
def test_values_and_gradients_are_the_oracles(entry, std, options):
    check(Case(entry, std=std, **options))


LINEAR = [entry for entry in ENTRIES if entry.startswith("linear_")]
OPTIONS_OF_ADDED = [
    {},
    {"tau": 1.0, "alpha": 1.0},
    {"tau": 3.1, "smoothing": 0.2, "weighted": True, "alpha_as_tensor": True},
]


@pytest.mark.parametrize("added", ADDED, ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("options", OPTIONS_OF_ADDED, ids=["plain", "tau1", "all_options"])
def test_added_terms_are_the_oracles(entry, options, added):
    check(Case(entry, std=3.0, added=added, **options))
    if entry in LINEAR:
        check(formed(entry, "both", std=3.0, added=added, **options))


@pytest.mark.parametrize("weights", ADDED, ids=str)
def test_an_added_term_is_in_the_loss_alone_and_its_weight_must_not_be_negative(weights):
    plain, added = Case("linear_dense").run(), Case("linear_dense", added=weights).run()
    assert float(added.loss_sum) > float(plain.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], added[1:], strict=True))
    (name,) = weights
    with pytest.raises(UserError, match=f"{name}=-1"):
        Case("dense", added={name: -1.0}).run()


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.startswith("linear_")])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 100])
def test_the_chunk_size_does_not_matter(entry, chunk_rows):
    check(Case(entry, extra={"chunk_rows": chunk_rows}))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("num_rows", "num_ignored"), [(1, 0), (1, 1), (6, 6), (0, 0)])
def test_one_row_no_rows_and_all_ignored(entry, num_rows, num_ignored):
    case = Case(entry, num_rows=num_rows, num_ignored=num_ignored)
    out = case.run()
    if num_rows > num_ignored:
        check(case)
        return
    out.loss_sum.backward()
    assert [x.item() for x in out[:4]] == [0.0, 0.0, 0.0, 0]
    assert not out.teachers[:, [0, 2, 3]].any()
    assert all(not leaf.grad.any() for leaf in case.leaves())


@pytest.mark.parametrize("entry", LINEAR)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize(
    "options",
    [
        {"extra": {"chunk_rows": 2}},
        {"tau": 1.0, "alpha": 1.0, "bias": False},
        {"tau": 3.1, "smoothing": 0.2, "weighted": True, "alpha_as_tensor": True},
    ],
    ids=["chunks", "tau1", "all_options"],
)
def test_scaled_and_capped_logits_are_the_oracles(entry, form, std, options):
    """At a spread of 30 most logits have reached their cap, where the gradient all but vanishes."""
    check(formed(entry, form, std=std, **options), value=3e-6, gradient=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_loss_of_the_logits_that_the_form_makes(form):
    case = formed("linear_dense", form)
    student = case.form.logits(case.student, case.weight, case.bias_V)
    assert relative(student, case.student_logits()) < 1e-6
    teacher = case.teacher_forms[0].logits(*case.heads[0])
    plain = inheritance_loss(student, case.labels, teacher_logits=teacher, **case.options())
    out = case.run()
    assert relative(out.loss_sum, plain.loss_sum) < 1e-6
    for ours, theirs in zip(*(torch.autograd.grad(o.loss_sum, case.leaves()) for o in (out, plain)), strict=True):
        assert relative(ours, theirs) < 2e-6
    evaluated = linear_cross_entropy(
        case.student, case.weight, case.labels, student_bias=case.bias_V, form=case.form, num_classes=33
    )
    assert torch.equal(evaluated.ce_sum, out.ce_sum) or relative(evaluated.ce_sum, out.ce_sum) < 1e-6


def test_padding_behind_a_cap_gets_no_gradient():
    for entry in LINEAR:
        case = formed(entry, "both")
        case.run().loss_sum.backward()
        assert case.weight.grad[:33].any()
        assert not case.weight.grad[33:].any()
        assert not case.bias_V.grad[33:].any()


@settings(max_examples=60, deadline=None)
@given(
    entry=st.sampled_from(ENTRIES),
    num_rows=st.integers(1, 12),
    num_classes=st.integers(3, 70),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    hidden=st.integers(1, 9),
    num_entries=st.integers(1, 70),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    tau=st.sampled_from([0.7, 1.0, 2.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(entry, num_rows, num_classes, padding, hidden, num_entries, alpha, tau, seed):
    check(
        Case(
            entry,
            num_rows=num_rows,
            num_classes=num_classes,
            width=num_classes + padding[0],
            teacher_width=num_classes + padding[1],
            hidden=hidden,
            num_entries=num_entries,
            num_ignored=seed % num_rows,
            alpha=alpha,
            tau=tau,
            seed=seed,
        ),
        gradient=2e-4,  # a gradient may nearly cancel
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 3.0, 30.0])
@pytest.mark.parametrize(("linear", "form"), [(False, LogitForm()), (True, LogitForm()), (True, LogitForm(0.3, 5.0))])
def test_half_precision_errs_no_more_than_plain_half_precision(dtype, std, linear, form):
    case = Case(
        "linear_dense" if linear else "dense",
        form=form,
        teacher_forms=(form, form),
        dtype=dtype,
        std=std,
        num_rows=40,
        num_classes=300,
        width=304,
        teacher_width=300,
    )
    case.extra = {"chunk_rows": 13} if linear else {}
    expected = case.expected()
    wants = torch.autograd.grad(expected[0], case.leaves())
    out = case.run()
    assert out.loss_sum.dtype == torch.float32
    ours = torch.autograd.grad(out.loss_sum, case.leaves())
    naive_loss = _naive_in_own_dtype(case)
    naive = torch.autograd.grad(naive_loss, case.leaves())
    assert relative(out.loss_sum, expected[0]) <= relative(naive_loss, expected[0]) + 1e-3
    for got, plain, want in zip(ours, naive, wants, strict=True):
        assert got.dtype == dtype
        assert relative(got, want) <= 1.05 * relative(plain, want) + 1e-3


def _naive_in_own_dtype(case):
    """Half-precision logits, everything after them by PyTorch in float32."""
    student, teacher = case.logits, case.teachers[0]
    if case.linear:
        heads = ((case.student, case.weight, case.bias_V), case.heads[0])
        student, teacher = (case.form.scale * F.linear(hidden, weight) + bias for hidden, weight, bias in heads)
    if case.form.cap is not None:
        student, teacher = (case.form.cap * torch.tanh(logits / case.form.cap) for logits in (student, teacher))
    student, teacher = (z[:, : case.num_classes].float() for z in (student, teacher))
    soft = F.log_softmax(student / case.tau, -1), F.softmax(teacher / case.tau, -1)
    keep = case.labels != -100
    kl = F.kl_div(soft[0][keep], soft[1][keep], reduction="sum")
    ce = F.cross_entropy(student, case.labels, reduction="sum")
    return (1 - case.alpha) * ce + case.alpha * case.tau**2 * kl


def test_small_float16_gradients_survive():
    """1 / V of 50k classes is subnormal in float16; scaled as a training step scales it, it must stay exact."""
    logits = torch.zeros(2, 50_000, dtype=torch.float16, requires_grad=True)
    labels = torch.tensor([0, 1])
    inheritance_loss(logits, labels).loss_sum.mul(2.0**14).backward()
    expected = torch.full((), 2.0**14 / 50_000)
    assert relative(logits.grad[0, 5], expected) < 1e-3


# -- invariances


def _problem(num_rows=6, width=50, seed=3):
    gen = torch.Generator().manual_seed(seed)
    student = torch.randn(num_rows, width, generator=gen).requires_grad_()
    return student, torch.randn(num_rows, width, generator=gen), torch.randint(0, width, (num_rows,), generator=gen)


def test_shifting_a_rows_logits_changes_nothing():
    student, teacher, labels = _problem()
    shift = torch.tensor([0.0, 5.0, -7.0, 100.0, 1.0, -50.0])[:, None]
    plain = inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.4)
    moved = inheritance_loss(student + shift, labels, teacher_logits=teacher - shift, alpha=0.4)
    assert relative(moved.loss_sum, plain.loss_sum) < 1e-5
    assert relative(moved.kl_sum, plain.kl_sum) < 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_rows_gradient_sums_to_0(smoothing):
    student, teacher, labels = _problem()
    inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.4, label_smoothing=smoothing).loss_sum.backward()
    assert student.grad.sum(-1).abs().max() < 1e-6


def test_a_teacher_equal_to_the_student_has_kl_0():
    student, _, labels = _problem()
    out = inheritance_loss(student, labels, teacher_logits=student.detach() + 3.0, alpha=1.0)
    out.loss_sum.backward()
    assert abs(float(out.kl_sum)) < 1e-5
    assert student.grad.abs().max() < 1e-6


def test_alpha_0_is_the_cross_entropy_and_never_reads_the_teacher():
    student, teacher, labels = _problem()
    poison = torch.full_like(teacher, float("nan"))
    expected = F.cross_entropy(student, labels, reduction="sum")
    for alpha in (0.0, torch.tensor(0.0)):
        student.grad = None
        out = inheritance_loss(student, labels, teacher_logits=poison, alpha=alpha)
        out.loss_sum.backward()
        assert relative(out.loss_sum, expected) < 1e-6
        assert float(out.kl_sum) == 0.0
        assert torch.isfinite(student.grad).all()


def test_padding_takes_no_probability_and_gets_no_gradient():
    student, teacher, labels = _problem(width=50)
    labels = labels % 44
    padded = torch.cat([student.detach()[:, :44], torch.full((6, 6), 80.0)], 1).requires_grad_()
    wide = torch.cat([teacher[:, :44], torch.full((6, 13), 90.0)], 1)
    out = inheritance_loss(padded, labels, teacher_logits=wide, alpha=0.5, num_classes=44)
    plain = inheritance_loss(student[:, :44], labels, teacher_logits=teacher[:, :44], alpha=0.5)
    out.loss_sum.backward()
    assert relative(out.loss_sum, plain.loss_sum) < 1e-6
    assert not padded.grad[:, 44:].any()


@pytest.mark.parametrize("semantics", ["renormalise", "tail", "sampled"])
def test_k_equal_to_v_is_the_dense_loss(semantics):
    student, teacher, labels = _problem()
    probs, ids = torch.softmax(teacher / 2, -1).topk(50, -1)
    sparse = topk_inheritance_loss(student, labels, topk_ids=ids, topk_probs=probs, semantics=semantics, alpha=0.6)
    dense = inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.6)
    assert relative(sparse.loss_sum, dense.loss_sum) < 1e-5
    grads = [torch.autograd.grad(out.loss_sum, student)[0] for out in (sparse, dense)]
    assert (grads[0] - grads[1]).abs().max() < 1e-6


def test_the_tail_stays_exact_where_the_students_rest_underflows():
    student = torch.full((1, 30), -60.0)
    student[0, :2] = torch.tensor([60.0, 55.0])
    student.requires_grad_()
    ids, probs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]])
    out = topk_inheritance_loss(
        student, torch.tensor([0]), topk_ids=ids, topk_probs=probs, semantics="tail", alpha=1.0, tau=1.0
    )
    expected = Oracle(alpha=1.0, tau=1.0).topk(student, torch.tensor([0]), ids, probs, "tail")
    assert relative(out.loss_sum, expected[0]) < 1e-5
    got, want = (torch.autograd.grad(loss, student)[0] for loss in (out.loss_sum, expected[0]))
    assert relative(got, want) < 1e-5


def test_sampled_entries_give_the_dense_gradient_on_average():
    student, teacher, labels = _problem(num_rows=1, width=12)
    target = torch.softmax(teacher / 2, -1)
    gen = torch.Generator().manual_seed(0)
    mean = torch.zeros_like(student)
    for _ in range(1500):
        drawn = torch.bincount(torch.multinomial(target[0], 8, replacement=True, generator=gen), minlength=12)
        out = topk_inheritance_loss(
            student,
            labels,
            topk_ids=torch.arange(12)[None],
            topk_probs=drawn[None] / 8.0,
            semantics="sampled",
            alpha=1.0,
        )
        mean += torch.autograd.grad(out.loss_sum, student)[0] / 1500
    dense = inheritance_loss(student, labels, teacher_logits=teacher, alpha=1.0)
    want = torch.autograd.grad(dense.loss_sum, student)[0]
    assert relative(mean, want) < 0.1


def test_parts_of_a_batch_add_up():
    student, teacher, labels = _problem(num_rows=6)
    whole = inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.4)
    parts = [
        inheritance_loss(student[i], labels[i], teacher_logits=teacher[i], alpha=0.4)
        for i in (slice(0, 2), slice(2, 6))
    ]
    for got, a, b in zip(whole, *parts, strict=True):
        assert relative(a + b, got) < 1e-6


def test_row_weights_scale_rows_and_leading_shapes_are_free():
    student, teacher, labels = _problem()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 3.0])
    flat = inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.4, row_weights=weights)
    shaped = inheritance_loss(
        student.view(2, 3, 50),
        labels.view(2, 3),
        teacher_logits=teacher.view(2, 3, 50),
        alpha=0.4,
        row_weights=weights.view(2, 3),
    )
    singles = [inheritance_loss(student[i], labels[i], teacher_logits=teacher[i], alpha=0.4) for i in range(6)]
    assert relative(flat.loss_sum, sum(w * s.loss_sum for w, s in zip(weights, singles, strict=True))) < 1e-5
    assert all(torch.equal(x, y) for x, y in zip(shaped, flat, strict=True))


def test_evaluation_holds_no_gradient_and_equals_the_cross_entropy():
    case = Case("linear_label")
    out = linear_cross_entropy(case.student, case.weight, case.labels, student_bias=case.bias_V, num_classes=33)
    assert not out.loss_sum.requires_grad
    assert relative(out.ce_sum, case.expected()[1]) < 1e-6
    with torch.no_grad():
        assert not case.run().loss_sum.requires_grad


# -- inside autograd


def test_inputs_are_left_as_they_are():
    for entry in ENTRIES:
        for tau in (1.0, 2.0):
            case = Case(entry, tau=tau)
            tensors = [*case.leaves(), *case.teachers, case.labels, *[t for head in case.heads for t in head]]
            before = [t.detach().clone() for t in tensors]
            case.run().loss_sum.backward()
            assert all(torch.equal(a, b.detach()) for a, b in zip(before, tensors, strict=True)), (entry, tau)


def test_only_required_gradients_are_computed():
    case = Case("linear_dense")
    weight = case.weight.detach()
    out = linear_inheritance_loss(
        case.student, weight, case.labels, teacher_hidden=case.heads[0][0], teacher_weight=case.heads[0][1], alpha=0.5,
        num_classes=33,
    )  # fmt: skip
    out.loss_sum.backward()
    assert case.student.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("entry", ["dense", "tail", "linear_dense", "linear_tail"])
def test_gradcheck(entry):
    case = formed(entry, "both", dtype=torch.float64, num_rows=4, num_ignored=1, smoothing=0.1, weighted=True)
    case.row_weights = case.row_weights.double()

    def function(*_):
        return case.run().loss_sum

    assert torch.autograd.gradcheck(function, case.leaves())


def test_second_backwards_are_refused_clearly():
    for entry in ("dense", "linear_dense"):
        case = Case(entry)
        out = case.run().loss_sum
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="compute the loss again"):
            out.backward()
        case = Case(entry)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(case.run().loss_sum, case.leaves()[0], create_graph=True)


def test_gradients_accumulate_and_tied_weights_get_both_parts():
    torch.manual_seed(0)
    embedding = nn.Embedding(30, 8)
    ids, labels = torch.randint(0, 30, (2, 10)), torch.randint(0, 30, (2, 10))
    for part in range(2):
        linear_inheritance_loss(embedding(ids[part]).tanh(), embedding.weight, labels[part]).loss_sum.backward()
    got = embedding.weight.grad.clone()
    embedding.weight.grad = None
    logits = embedding(ids).tanh() @ embedding.weight.T
    F.cross_entropy(logits.view(-1, 30), labels.view(-1), reduction="sum").backward()
    assert relative(got, embedding.weight.grad) < 1e-5


class Student(nn.Module):
    """Two layers and a head whose forward is the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 21)
        self.form = LogitForm()

    def forward(self, x, labels, teacher, recompute=False):
        for layer in self.layers:
            run = lambda y, layer=layer: layer(y).tanh()  # noqa: E731
            x = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        return linear_inheritance_loss(
            x, self.head.weight, labels, student_bias=self.head.bias, student_form=self.form,
            teacher_hidden=teacher[0], teacher_weight=teacher[1], teacher_form=self.form, alpha=0.3, chunk_rows=4,
        )  # fmt: skip


def _student_inputs():
    gen = torch.Generator().manual_seed(5)
    teacher = torch.randn(10, 4, generator=gen), torch.randn(21, 4, generator=gen)
    return torch.randn(10, 8, generator=gen), torch.randint(0, 21, (10,), generator=gen), teacher


def test_checkpointed_layers_before_it_change_nothing():
    grads = []
    for recompute in (False, True):
        model = Student()
        model(*_student_inputs(), recompute=recompute).loss_sum.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("linear", "form"), [(True, LogitForm()), (True, LogitForm(0.5, 3.0)), (False, LogitForm())])
def test_torch_compile_takes_it_whole(linear, form):
    model, (x, labels, teacher) = Student(), _student_inputs()
    model.form = form

    def run(x):
        if linear:
            return model(x, labels, teacher).loss_sum
        logits = model.head(model.layers[0](x))
        return inheritance_loss(logits, labels, teacher_logits=teacher[0] @ teacher[1].T, alpha=0.3).loss_sum

    run(x).mul(0.5).backward()
    want = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(run, backend="aot_eager", fullgraph=True)(x).mul(0.5).backward()
    for parameter, grad in zip(model.parameters(), want, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or relative(parameter.grad, grad) < 1e-6


def test_autocast_casts_as_a_linear_layer_would():
    case = Case("linear_dense")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.run().loss_sum.backward()
    assert case.weight.grad.dtype == torch.float32
    want = torch.autograd.grad(case.expected()[0], case.weight)[0]
    assert relative(case.weight.grad, want) < 2e-2


# -- the released code's numbers


@pytest.mark.skipif(not RELEASED.is_dir(), reason=f"reference values of the released code are not at {RELEASED}")
def test_the_released_codes_values():
    from safetensors.torch import load_file

    reference = json.loads((RELEASED / "reference.json").read_text())
    tensors = load_file(RELEASED / "reference.safetensors")
    labels = tensors["mlm.labels"][tensors["mlm.labels"] != reference["pad_id"]]
    for step, expected in reference["steps"].items():
        done, horizon = int(step.split("_")[-1]), reference["max_update_distil"]
        alpha = float(done < horizon) if "heaviside" in step else max(0.0, 1 - done / horizon)
        student = tensors["student.masked_logits"].clone().requires_grad_()
        out = inheritance_loss(student, labels, teacher_logits=tensors["teacher.masked_logits"], alpha=alpha)
        assert relative(out.loss_sum, expected["loss_sum"]) < 1e-5
        if "mlm_sum_nats" not in expected:
            continue
        assert relative(out.ce_sum, expected["mlm_sum_nats"]) < 1e-5
        assert int(out.num_rows) == expected["num_masked"]
        if alpha:  # the released code reports tau^2 KL
            assert relative(reference["tau"] ** 2 * out.kl_sum, expected["distil_sum_nats"]) < 1e-5
        out.loss_sum.backward()
        assert relative(student.grad.sum(0).norm(), expected["grad_l2"]["decoder.lm_head.bias"]) < 1e-5


# -- errors of a user


def _bad(**changes):
    student, teacher, labels = _problem()
    arguments = {"student_logits": student, "labels": labels, "teacher_logits": teacher, "alpha": 0.5} | changes
    return inheritance_loss(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is outside"),
        ({"alpha": torch.zeros(2)}, "0-d tensor"),
        ({"tau": 0.0}, "tau=0.0 is not positive"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels has rows"),
        ({"labels": torch.zeros(6)}, "labels have dtype"),
        ({"labels": torch.full((6,), 77)}, "label 77 is neither a class"),
        ({"teacher_logits": torch.zeros(6, 51)}, "give num_classes"),
        ({"teacher_logits": torch.zeros(5, 50)}, "teacher_logits has rows"),
        ({"teacher_logits": torch.zeros(6, 50, dtype=torch.int64)}, "dtype"),
        ({"teacher_logits": None}, "needs a teacher"),
        ({"num_classes": 51}, "num_classes=51 must lie"),
        ({"row_weights": torch.ones(2)}, "row_weights has rows"),
        ({"backend": "cuda"}, "is not one of auto, triton, torch"),
        ({"student_logits": torch.zeros(6, 50, dtype=torch.int64)}, "give float32"),
    ],
)
def test_errors_are_one_line_that_names_the_value(changes, message):
    with pytest.raises(UserError, match=message) as error:
        _bad(**changes)
    assert "\n" not in str(error.value)


def test_errors_of_the_other_functions():
    student, teacher, labels = _problem()
    hidden, weight = torch.zeros(6, 4), torch.zeros(50, 4)
    probs, ids = torch.softmax(teacher, -1).topk(3, -1)
    with pytest.raises(UserError, match="semantics='mean'"):
        topk_inheritance_loss(student, labels, topk_ids=ids, topk_probs=probs, semantics="mean", alpha=0.5)
    with pytest.raises(UserError, match="differ; give both"):
        topk_inheritance_loss(student, labels, topk_ids=ids[:, :2], topk_probs=probs, alpha=0.5)
    with pytest.raises(UserError, match="does not fit student_hidden"):
        linear_inheritance_loss(hidden, torch.zeros(50, 5), labels)
    with pytest.raises(UserError, match="belong together"):
        linear_inheritance_loss(hidden, weight, labels, teacher_hidden=hidden, alpha=0.5)
    with pytest.raises(UserError, match="chunk_rows=0"):
        linear_inheritance_loss(hidden, weight, labels, chunk_rows=0)
    for name in ("student_form", "teacher_form"):
        given = {"teacher_hidden": hidden, "teacher_weight": weight, "alpha": 0.5}
        wrong = ((0.0, None), (float("nan"), None), (1.0, 0.0), (1.0, -3.0), (1.0, float("inf")))
        for form in (LogitForm(*numbers) for numbers in wrong):
            with pytest.raises(UserError, match=r"form has (scale|cap)=") as error:
                linear_inheritance_loss(hidden, weight, labels, **given | {name: form})
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cast one of them"):
        linear_inheritance_loss(hidden, weight.bfloat16(), labels)
    with pytest.raises(UserError, match="teachers is empty"):
        multi_teacher_loss(student, labels, teachers=[], alpha=0.5)
    with pytest.raises(UserError, match="differ; give both"):
        linear_topk_inheritance_loss(hidden, weight, labels, topk_ids=ids[:, :2], topk_probs=probs, alpha=0.5)
