import pytest
import torch

from ki_ds.objective import ops


def _linear_inputs(dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=gen).to(dtype).requires_grad_() for shape in ((6, 4), (9, 4)))
    labels = torch.randint(0, 8, (6,), generator=gen)
    head = [torch.randn(6, 3, generator=gen), torch.randn(8, 3, generator=gen), torch.empty(0), torch.empty(0)]
    tensors = (hidden, weight, None, labels, None, None, None, None)
    forms = [1.0, 0.0, 0.5, 3.0]
    wants = [True, True, False]
    return (*tensors, head, [1.0], forms, 0.5, 2.0, -100, 8, 0.1, "renormalise", 4, "torch", wants)


def _logits_inputs():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=gen).requires_grad_()
    labels = torch.randint(0, 8, (6,), generator=gen)
    tensors = (logits, labels, torch.rand(6, generator=gen), None, None, None, [torch.randn(6, 8, generator=gen)])
    return (*tensors, [], 0.5, 2.0, -100, 8, 0.0, "renormalise", "torch", True)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [(ops.linear_loss_op, _linear_inputs), (ops.logits_loss_op, _logits_inputs)],
    ids=["linear", "logits"],
)
def test_the_operators_keep_pytorchs_rules(op, inputs):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, inputs(), test_utils=checks)


@pytest.mark.parametrize("kind", ["linear", "logits"])
def test_operator_and_function_agree(kind):
    inputs = _linear_inputs if kind == "linear" else _logits_inputs
    grads = []
    for run in (getattr(ops, f"{kind}_loss_op"), getattr(ops, f"{kind}_loss")):
        arguments = inputs()
        run(*arguments)[0].mul(3.0).backward()
        grads.append(arguments[0].grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaling_takes_factors_that_the_dtype_cannot_hold(dtype):
    tensor = torch.full((3,), 2.0**-10, dtype=dtype)
    ops.scale_(tensor, torch.tensor(2.0**17), "torch")
    assert tensor.tolist() == [2.0**7] * 3
