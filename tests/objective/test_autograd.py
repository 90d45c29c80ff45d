import pytest
import torch

from ki_ds.objective import autograd
from ki_ds.objective.autograd import Loss, Packed, loss_op
from ki_ds.objective.checks import checked
from ki_ds.objective.rows import Objective
from ki_ds.objective.types import Average, Head, LogitForm, Logits, Part, Routed, Sparse

TEACHERS = ("head", "logits", "sparse", "average", "routed", "nobody")


def _problem(kind, teacher, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    leaves = [normal(*shape).to(dtype).requires_grad_() for shape in ((6, 4), (9, 4))]
    student = Head(*leaves, None, LogitForm(0.5, 3.0))
    if kind == "logits":
        student = Logits(normal(6, 9).requires_grad_())
    heads = [Head(normal(n, 3), normal(8, 3), normal(8), LogitForm(cap=3.0)) for n in (6, 6, 2)]
    signal = {
        "head": heads[0],
        "logits": Logits(normal(6, 8)),
        "sparse": Sparse(torch.tensor([[1, 5]] * 6), torch.full((6, 2), 0.4), "tail"),
        "average": Average((heads[0], heads[1]), (1.0, 3.0)),
        "routed": Routed((Part(1, heads[2], torch.tensor([4, 1])),), 2),
        "nobody": None,
    }[teacher]
    alpha = 0.0 if signal is None else torch.tensor(0.5) if teacher == "sparse" else 0.5
    objective = Objective(8, alpha=alpha, label_smoothing=0.1)
    labels, weights = torch.randint(0, 8, (6,), generator=gen), torch.rand(6, generator=gen)
    return checked(student, labels, signal, objective, row_weights=weights, backend="auto", chunk_rows=4)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("kind", ["head", "logits"])
def test_the_operator_keeps_pytorchs_rules_and_is_the_function(kind, teacher):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    packed = Packed(_problem(kind, teacher))
    torch.library.opcheck(loss_op, (packed.tensors, packed.floats, packed.ints, packed.expression), test_utils=checks)
    results = []
    for run in (autograd.traced, lambda problem: Loss.apply(problem, *problem.student.tensors)):
        problem = _problem(kind, teacher)
        sums = run(problem)[:5]
        leaves = [leaf for leaf in problem.student.tensors if leaf is not None]
        results.append([*sums, *torch.autograd.grad(sums[0] * 3.0, leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaling_takes_factors_that_the_dtype_cannot_hold(dtype):
    tensor = torch.full((3,), 2.0**-10, dtype=dtype)
    autograd.scale_(tensor, torch.tensor(2.0**17), "torch")
    assert tensor.tolist() == [2.0**7] * 3
