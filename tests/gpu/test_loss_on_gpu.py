"""Everything of `test_loss.py` that depends on the device, on a GPU: Triton's kernels and plain PyTorch there."""

import pytest
import torch

from ki_ds.loss import inheritance_loss, linear_inheritance_loss, resolve_backend
from ki_ds.objective import reference
from ki_ds.objective.rows import TOPK_SEMANTICS, RowTask
from tests.loss_cases import ENTRIES, Case, check, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BACKENDS = ("triton", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"std": 30.0, "tau": 1.0, "alpha": 1.0},
        {"tau": 3.1, "smoothing": 0.2, "weighted": True, "alpha_as_tensor": True},
    ],
    ids=["plain", "spread", "all_options"],
)
def test_values_and_gradients_are_the_oracles(backend, entry, options):
    sizes = {"num_classes": 5000, "width": 5008, "teacher_width": 5000, "num_entries": 50}
    check(Case(entry, device="cuda", backend=backend, **sizes, **options), gradient=2e-4)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("num_rows", "num_ignored"), [(1, 0), (1, 1), (6, 6), (0, 0)])
def test_one_row_no_rows_and_all_ignored(entry, num_rows, num_ignored):
    case = Case(entry, device="cuda", backend="triton", num_rows=num_rows, num_ignored=num_ignored)
    out = case.run()
    if num_rows > num_ignored:
        check(case)
        return
    out.loss_sum.backward()
    assert [x.item() for x in out] == [0.0, 0.0, 0.0, 0]
    assert all(not leaf.grad.any() for leaf in case.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("kind", ["dense", *TOPK_SEMANTICS])
def test_kernels_at_the_papers_vocabulary(dtype, std, kind):
    from ki_ds.objective import triton_dense, triton_topk

    gen = torch.Generator("cuda").manual_seed(0)
    student, teacher = (torch.randn(48, 50304, device="cuda", generator=gen).mul_(std).to(dtype) for _ in range(2))
    labels = torch.randint(0, 50265, (48,), device="cuda", generator=gen)
    labels[5] = -100
    task = RowTask(50265, alpha=0.4, semantics=kind if kind != "dense" else "renormalise")
    grad, wanted = student.clone(), torch.empty(48, 50304, device="cuda", dtype=torch.float64)
    if kind == "dense":
        terms = triton_dense.dense_rows(grad, labels, teacher, task, grad_NV=grad)
        want = reference.dense_rows(student.double(), labels, teacher.double(), task, grad_NV=wanted)
    else:
        probs, ids = torch.softmax(teacher[:, :50265].float() / 2, -1).topk(100, -1)
        terms = triton_topk.topk_rows(grad, labels, ids, probs, task, grad_NV=grad)
        want = reference.topk_rows(student.double(), labels, ids, probs.double(), task, grad_NV=wanted)
    assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-4) for a, b in zip(terms, want, strict=True))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 2e-3}[dtype]
    assert relative(grad, wanted) < rounding
    assert not grad[:, 50265:].any()
    assert not grad[5].any()


def test_more_elements_than_32_bits_count():
    """45,056 rows of 50,304 logits are 2.27e9: the last rows must equal the same rows alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    rows, width = 45_056, 50_304
    student = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    teacher = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.randint(0, width, (rows,), device="cuda")
    inheritance_loss(student, labels, teacher_logits=teacher, alpha=0.5).loss_sum.mul(0.5).backward()
    last = student.detach()[-4:].clone().requires_grad_()
    inheritance_loss(last, labels[-4:], teacher_logits=teacher[-4:], alpha=0.5).loss_sum.mul(0.5).backward()
    assert torch.equal(student.grad[-4:], last.grad)


def _linear_inputs(num_rows=512, width=4096):
    gen = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=gen).mul_(0.3).bfloat16()

    hidden, weight = normal(num_rows, 64).requires_grad_(), normal(width, 64).requires_grad_()
    labels = torch.randint(0, width, (num_rows,), device="cuda", generator=gen)
    return hidden, weight, labels, {"teacher_hidden": normal(num_rows, 32), "teacher_weight": normal(width, 32)}


def test_chunks_change_nothing_and_the_weights_gradient_is_summed_in_float32():
    grads = []
    for chunk_rows in (64, 512):
        hidden, weight, labels, teacher = _linear_inputs()
        out = linear_inheritance_loss(hidden, weight, labels, **teacher, alpha=0.5, chunk_rows=chunk_rows)
        grads.append(torch.autograd.grad(out.loss_sum, (hidden, weight)))
    for a, b in zip(*grads, strict=True):
        assert relative(a, b) < 1e-3


def test_nothing_in_a_step_waits_for_the_device():
    hidden, weight, labels, teacher = _linear_inputs()
    alpha = torch.tensor(0.5, device="cuda")
    linear_inheritance_loss(hidden, weight, labels, **teacher, alpha=alpha).loss_sum.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = linear_inheritance_loss(hidden, weight, labels, **teacher, alpha=alpha)
        (out.loss_sum / out.num_rows).backward()
        logits = (hidden @ weight.T).detach().requires_grad_()
        out = inheritance_loss(logits, labels, alpha=alpha, teacher_logits=logits.detach())
        (out.loss_sum / out.num_rows).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_it_with_another_alpha():
    hidden, weight, labels, teacher = _linear_inputs()
    alpha = torch.tensor(0.5, device="cuda")

    def run():
        out = linear_inheritance_loss(hidden, weight, labels, **teacher, alpha=alpha, chunk_rows=128)
        return out.loss_sum, *torch.autograd.grad(out.loss_sum, (hidden, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value in (0.25, 1.0):
        alpha.fill_(value)
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)


def test_the_memory_beyond_inputs_and_gradients_is_bounded():
    """8,192 rows, 50,304 classes, bfloat16: at most 1 GB more than inputs and gradients."""
    gen = torch.Generator("cuda").manual_seed(1)
    hidden, weight = (
        torch.randn(n, 1024, device="cuda", generator=gen).bfloat16().requires_grad_() for n in (8192, 50304)
    )
    teacher = [torch.randn(n, 768, device="cuda", generator=gen).bfloat16() for n in (8192, 50304)]
    labels = torch.randint(0, 50265, (8192,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_inheritance_loss(
        hidden, weight, labels, teacher_hidden=teacher[0], teacher_weight=teacher[1], alpha=0.5, num_classes=50265
    ).loss_sum.backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before - gradients <= 1e9


def test_auto_takes_triton_here():
    pytest.importorskip("triton")
    assert resolve_backend("auto", "cuda") == "triton"


@pytest.mark.parametrize("fullgraph", [True])
def test_torch_compile_takes_it_whole(fullgraph):
    hidden, weight, labels, teacher = _linear_inputs()

    def run(h):
        return linear_inheritance_loss((h * 1.5).tanh(), weight, labels, **teacher, alpha=0.5).loss_sum

    want = torch.autograd.grad(run(hidden), hidden)[0]
    got = torch.autograd.grad(torch.compile(run, fullgraph=fullgraph)(hidden), hidden)[0]
    assert relative(got, want) < 1e-2
