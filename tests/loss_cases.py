"""Inputs for every entry of the loss, each next to the oracle's answer; the CPU's and the GPU's tests share them."""

import math
from dataclasses import dataclass, field

import torch

from ki_ds import loss
from ki_ds.objective.types import PLAIN, LogitForm
from tests.loss_oracle import Oracle

ENTRIES = (
    "label", "dense", "renormalise", "tail", "sampled", "averaged", "routed", "linear_label", "linear_dense",
    "linear_renormalise", "linear_tail", "linear_sampled", "linear_averaged", "linear_routed",
)  # fmt: skip
# the student's form and its two teachers': scaled, capped, both
FORMS = {
    "scaled": (LogitForm(0.25), LogitForm(3.0), LogitForm(-0.5)),
    "capped": (LogitForm(cap=3.0), LogitForm(cap=2.0), LogitForm()),
    "both": (LogitForm(-1.5, 5.0), LogitForm(1.7, 30.0), LogitForm(0.5, 4.0)),
}


@dataclass
class Case:
    """One set of inputs: padded to two widths, with some rows ignored."""

    entry: str = "dense"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backend: str = "torch"
    alpha: float = 0.3
    tau: float = 2.0
    smoothing: float = 0.0
    added: dict = field(default_factory=dict)  # weights of added terms, by their names in `Objective` and `Oracle`
    weighted: bool = False
    std: float = 1.0
    num_rows: int = 9
    num_classes: int = 33
    width: int = 40
    teacher_width: int = 37
    hidden: int = 7
    teacher_hidden: int = 5
    num_entries: int = 6
    num_ignored: int = 2
    seed: int = 0
    bias: bool = True
    alpha_as_tensor: bool = False
    form: LogitForm = PLAIN
    teacher_forms: tuple[LogitForm, LogitForm] = (PLAIN, PLAIN)
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        gen = torch.Generator().manual_seed(self.seed)
        n, wide = self.num_rows, (self.width, self.teacher_width)

        def normal(*shape, std=1.0):
            return (torch.randn(*shape, generator=gen) * std).to(self.device, self.dtype)

        self.logits = normal(n, wide[0], std=self.std).requires_grad_()
        self.teachers = [normal(n, wide[1], std=self.std) for _ in range(2)]
        self.student = normal(n, self.hidden).requires_grad_()
        scale = self.std / self.hidden**0.5
        self.weight = normal(wide[0], self.hidden, std=scale).requires_grad_()
        self.bias_V = normal(wide[0]).requires_grad_() if self.bias else None
        self.heads = [
            (
                normal(n, self.teacher_hidden),
                normal(wide[1], self.teacher_hidden, std=self.std / self.teacher_hidden**0.5),
                normal(wide[1]) if self.bias else None,
            )
            for _ in range(2)
        ]
        self.labels = torch.randint(0, self.num_classes, (n,), generator=gen)
        self.labels[torch.randperm(n, generator=gen)[: self.num_ignored]] = -100
        self.labels = self.labels.to(self.device)
        self.row_weights = torch.rand(n, generator=gen).to(self.device) if self.weighted else None
        self.routes = torch.randperm(n, generator=gen).to(self.device)
        self.shares = (0.25, 0.75)

    # -- what the oracle sees

    @property
    def linear(self):
        return self.entry.startswith("linear_")

    @property
    def kind(self):
        return self.entry.removeprefix("linear_")

    def leaves(self):
        if not self.linear:
            return [self.logits]
        return [self.student, self.weight] + ([] if self.bias_V is None else [self.bias_V])

    def student_logits(self):
        if not self.linear:
            return self.logits.double()
        return self._project(self.student, self.weight, self.bias_V, self.form)

    def teacher_logits(self, number):
        if not self.linear:
            return self.teachers[number]
        return self._project(*self.heads[number], self.teacher_forms[number])

    @staticmethod
    def _project(hidden, weight, bias, form):
        logits = form.scale * (hidden.double() @ weight.double().T)
        logits = logits if bias is None else logits + bias.double()
        return logits if form.cap is None else form.cap * torch.tanh(logits / form.cap)

    def topk(self):
        """ids and probabilities of the first teacher; the label is an entry in one row, two entries are absent."""
        probs = torch.softmax(self.teacher_logits(0)[:, : self.num_classes].float() / self.tau, -1)
        probs, ids = probs.topk(min(self.num_entries, self.num_classes), -1)
        if self.num_rows and self.num_entries < self.num_classes:
            first = int(self.labels[0])
            if first >= 0 and first not in ids[0].tolist():
                ids[0, -1] = first
            probs[-1, -1] = 0.0
            ids[-1, max(0, probs.shape[1] - 2)] = -1
        return ids, probs

    def split(self):
        """Rows of the two teachers, shuffled; the last third of the rows has none."""
        third = self.num_rows // 3
        return self.routes[:third], self.routes[third : 2 * third]

    def expected(self):
        oracle = Oracle(
            alpha=self.alpha,
            tau=self.tau,
            num_classes=self.num_classes,
            smoothing=self.smoothing,
            **self.added,
            weights=None if self.row_weights is None else self.row_weights.tolist(),
        )
        student = self.student_logits()
        match self.kind:
            case "label":
                return Oracle.labels_only(oracle, student, self.labels)
            case "dense":
                return oracle.dense(student, self.labels, self.teacher_logits(0))
            case "averaged":
                both = [[oracle.target(row) for row in self.teacher_logits(i)] for i in (0, 1)]
                mixed = [self.shares[0] * a + self.shares[1] * b for a, b in zip(*both, strict=True)]
                return oracle.mixed(student, self.labels, mixed)
            case "routed":
                targets = [None] * self.num_rows
                for number, rows in enumerate(self.split()):
                    for row in rows.tolist():
                        targets[row] = oracle.target(self.teacher_logits(number)[row])
                return oracle.mixed(student, self.labels, targets)
            case semantics:
                return oracle.topk(student, self.labels, *self.topk(), semantics)

    def told(self):
        """What is expected of `teachers`: (KL, teacher's CE or None, rows, student's CE) for each of them."""
        everyone = torch.arange(self.num_rows, device=self.device)
        if self.alpha == 0.0 and not self.alpha_as_tensor:
            return []
        match self.kind:
            case "label":
                return []
            case "dense":
                return [self._told(everyone, self.teacher_logits(0))]
            case "averaged":
                both = (
                    torch.softmax(self.teacher_logits(i)[:, : self.num_classes].double() / self.tau, -1) for i in (0, 1)
                )
                mixed = sum(share * probs for share, probs in zip(self.shares, both, strict=True))
                return [self._told(everyone, mixed.log() * self.tau)]
            case "routed":
                return [self._told(rows, self.teacher_logits(number)) for number, rows in enumerate(self.split())]
            case _:
                _, ce_sum, kl_sum, count = self.expected()
                return [(kl_sum, None, count, ce_sum)]

    def _told(self, rows, teacher):
        kept = rows[self.labels[rows] != -100]
        q = torch.softmax(teacher[kept, : self.num_classes].double() / self.tau, -1)
        student = self.student_logits()[kept, : self.num_classes].detach()
        p = torch.softmax(student / self.tau, -1)
        own, ce = (
            torch.nn.functional.cross_entropy(logits.double(), self.labels[kept], reduction="sum")
            for logits in (teacher[kept, : self.num_classes], student)
        )
        return (q * (q.log() - p.log())).sum(), own, len(kept), ce

    # -- what the package says

    def options(self):
        alpha = self.alpha if self.kind != "label" else 0.0
        return {
            "alpha": torch.tensor(alpha, device=self.device) if self.alpha_as_tensor else alpha,
            "tau": self.tau,
            "num_classes": self.num_classes,
            "row_weights": self.row_weights,
            "label_smoothing": self.smoothing,
            **self.added,
            "backend": self.backend,
            **self.extra,
        }

    def run(self):
        options = self.options()
        if self.linear:
            options |= {"student_bias": self.bias_V, "student_form": self.form}
            arguments = (self.student, self.weight, self.labels)
        else:
            arguments = (self.logits, self.labels)
        match self.kind:
            case "label" | "dense":
                return self._single(arguments, options)
            case "averaged" | "routed":
                return self._several(arguments, options)
            case semantics:
                function = loss.linear_topk_inheritance_loss if self.linear else loss.topk_inheritance_loss
                ids, probs = self.topk()
                return function(*arguments, topk_ids=ids, topk_probs=probs, semantics=semantics, **options)

    def _single(self, arguments, options):
        if not self.linear:
            teacher = {"teacher_logits": self.teachers[0]} if self.kind == "dense" else {}
            return loss.inheritance_loss(*arguments, **teacher, **options)
        names = ("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_form")
        head = (*self.heads[0], self.teacher_forms[0])
        teacher = dict(zip(names, head, strict=True)) if self.kind == "dense" else {}
        return loss.linear_inheritance_loss(*arguments, **teacher, **options)

    def _several(self, arguments, options):
        routes = (None, None) if self.kind == "averaged" else self.split()
        options["shares"] = self.shares if self.kind == "averaged" else None
        if not self.linear:
            given = [
                loss.TeacherLogits(t if rows is None else t[rows], rows)
                for t, rows in zip(self.teachers, routes, strict=True)
            ]
            return loss.multi_teacher_loss(*arguments, teachers=given, **options)
        given = [
            loss.TeacherHead(hidden if rows is None else hidden[rows], weight, bias, rows, form)
            for (hidden, weight, bias), rows, form in zip(self.heads, routes, self.teacher_forms, strict=True)
        ]
        return loss.linear_multi_teacher_loss(*arguments, teachers=given, **options)


def formed(entry, name, **options):
    """The case of an entry whose heads have the forms of that name."""
    student, *teachers = FORMS[name]
    return Case(entry, form=student, teacher_forms=tuple(teachers), **options)


def relative(value, expected):
    """Distance over size, for scalars and tensors."""
    value, expected = torch.as_tensor(value).detach().double(), torch.as_tensor(expected).detach().double()
    return float((value - expected.to(value.device)).norm() / expected.norm().clamp(min=1e-9))


def check_told(case, teachers, value):
    """`teachers` of the loss against what float64 says of each."""
    wants = case.told()
    assert teachers.shape == (len(wants), 4)
    assert teachers.dtype == torch.float32
    assert not teachers.requires_grad
    for (kl, own, rows, ce), (want_kl, want_own, want_rows, want_ce) in zip(teachers.tolist(), wants, strict=True):
        assert rows == want_rows
        assert abs(kl - float(want_kl)) <= value * abs(float(want_kl)) + 2.0**-22 * max(rows, 1)
        assert math.isnan(own) if want_own is None else abs(own - float(want_own)) <= value * abs(float(want_own))
        assert abs(ce - float(want_ce)) <= value * abs(float(want_ce))


def check(case, *, value=2e-5, gradient=5e-5, factor=0.7):
    """The case's sums and gradients against the oracle's, with `factor` coming into backward."""
    out, expected = case.run(), case.expected()
    for name, got, want in zip(out._fields[:3], out[:3], expected[:3], strict=True):
        assert got.dtype == torch.float32, name
        assert got.shape == (), name
        # a small KL is a difference of log-sum-exps, which float32 rounds by row
        rounding = 0.0 if name == "ce_sum" else 2.0**-22 * max(case.num_rows, 1)
        assert abs(float(got) - float(want)) <= value * abs(float(want)) + rounding, (case, name, got, want)
    assert out.num_rows.dtype == torch.int64
    assert int(out.num_rows) == expected[3]
    check_told(case, out.teachers, value)
    assert not out.ce_sum.requires_grad
    assert not out.kl_sum.requires_grad
    grads = torch.autograd.grad(out.loss_sum * factor, case.leaves())
    wants = torch.autograd.grad(expected[0] * factor, case.leaves())
    for number, (got, want) in enumerate(zip(grads, wants, strict=True)):
        assert got.dtype == case.leaves()[number].dtype
        assert relative(got, want) < gradient, (case, number, relative(got, want))
