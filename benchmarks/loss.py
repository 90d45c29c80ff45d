"""Time, memory and error of the loss, forward and backward, next to PyTorch and other libraries; one table last.

    python -m benchmarks.loss --size paper --out loss.json     # a GPU: the paper's heads, bfloat16
    python -m benchmarks.loss --size small                     # two cores

Rows are timed in turns, so that all of them see the same machine; times are medians with the fastest and slowest.
Before every timing the caches are flushed. "same" rows compute CE + tau^2 KL and its gradients, "part" rows less
(CE or KL alone), "floor" rows are what no implementation can go below: the bare GEMMs, one copy. Memory is the
peak above the inputs. The error is that of the gradients against float64, on the first rows.
Other libraries come with `pip install ki_ds[peers]`; a row that cannot run is skipped by name.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import heading, markdown, parser, show, write_results
from ki_ds.loss import (
    inheritance_loss,
    linear_inheritance_loss,
    linear_topk_inheritance_loss,
    resolve_backend,
)
from ki_ds.objective.chunks import row_functions
from ki_ds.objective.rows import RowTask

ALPHA, TAU, NUM_ENTRIES, NUM_ERROR_ROWS = 0.5, 2.0, 10, 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Skip(Exception):  # noqa: N818
    """A row cannot run here; the message says why."""


@dataclass(frozen=True)
class Size:
    """`num_rows` labelled rows, hidden widths of student and teacher, real and padded vocabulary."""

    num_rows: int
    student: int
    teacher: int
    num_classes: int = 50_265
    width: int = 50_304

    def __str__(self) -> str:
        return f"N {self.num_rows}, d {self.student}/{self.teacher}, V {self.num_classes}"


HEADS = ((768, 576), (1024, 768), (1440, 1280))
SIZES = {
    "paper": [Size(n, *head) for head in HEADS for n in (1229, 8192, 16384)],
    "one": [Size(8192, 1024, 768)],
    "small": [Size(64, 768, 576), Size(256, 768, 576), Size(1229, 768, 576), Size(2048, 256, 128, 4096, 4096)],
    "tiny": [Size(16, 32, 16, 500, 512)],
}


@dataclass
class Inputs:
    """Tensors of one size; `rows` takes the first rows in another dtype."""

    size: Size
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @classmethod
    def make(cls, size: Size, dtype: torch.dtype, device: str) -> Inputs:
        gen = torch.Generator(device).manual_seed(0)

        def normal(rows: int, width: int, std: float) -> Tensor:
            return torch.randn(rows, width, device=device, generator=gen).mul_(std).to(dtype)

        # logits of standard deviation 2
        student = [
            normal(n, size.student, std) for n, std in ((size.num_rows, 1.0), (size.width, 2 / size.student**0.5))
        ]
        teacher = [
            normal(n, size.teacher, std) for n, std in ((size.num_rows, 1.0), (size.width, 2 / size.teacher**0.5))
        ]
        labels = torch.randint(0, size.num_classes, (size.num_rows,), device=device, generator=gen)
        return cls(size, student[0].requires_grad_(), student[1].requires_grad_(), teacher[0], teacher[1], labels)

    def rows(self, num_rows: int, dtype: torch.dtype) -> Inputs:
        student = [self.hidden[:num_rows], self.weight]
        student = [t.detach().to(dtype, copy=True).requires_grad_() for t in student]
        teacher = [self.teacher_hidden[:num_rows].to(dtype), self.teacher_weight.to(dtype)]
        return Inputs(self.size, student[0], student[1], teacher[0], teacher[1], self.labels[:num_rows])

    @property
    def cuda(self) -> bool:
        return self.hidden.is_cuda

    @property
    def head_leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight]


@dataclass(frozen=True)
class Row:
    """A benchmark row: `build` returns a function that runs once and returns gradients (or nothing, for a floor)."""

    name: str
    kind: str  # same | part | floor
    group: str  # linear | full
    build: Callable[[Inputs], Callable[[], list[Tensor]]]
    gpu_only: bool = False


# -- rows that start from hidden states


def _gradients(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: list(torch.autograd.grad(loss(), leaves))


def _objective(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The objective as one writes it in PyTorch, in float32 (float64 stays)."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student[:, :num_classes].to(wide), teacher[:, :num_classes].to(wide)
    ce = F.cross_entropy(student, labels, reduction="sum")
    kl = F.kl_div(F.log_softmax(student / TAU, -1), F.softmax(teacher / TAU, -1), reduction="sum")
    return (1 - ALPHA) * ce + ALPHA * TAU**2 * kl


def eager(x: Inputs) -> Callable[[], list[Tensor]]:
    def loss() -> Tensor:
        student, teacher = x.hidden @ x.weight.T, x.teacher_hidden @ x.teacher_weight.T
        return _objective(student, teacher, x.labels, x.size.num_classes)

    return _gradients(loss, x.head_leaves)


def compiled(x: Inputs) -> Callable[[], list[Tensor]]:
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return _objective(hidden @ weight.T, x.teacher_hidden @ x.teacher_weight.T, x.labels, x.size.num_classes)

    fast = torch.compile(loss, dynamic=False)
    return _gradients(lambda: fast(x.hidden, x.weight), x.head_leaves)


def ours_linear(x: Inputs) -> Callable[[], list[Tensor]]:
    teacher: dict[str, Any] = {"teacher_hidden": x.teacher_hidden, "teacher_weight": x.teacher_weight}
    options: dict[str, Any] = {"alpha": ALPHA, "tau": TAU, "num_classes": x.size.num_classes}
    return _gradients(
        lambda: linear_inheritance_loss(x.hidden, x.weight, x.labels, **teacher, **options).loss_sum, x.head_leaves
    )


def ours_topk(x: Inputs) -> Callable[[], list[Tensor]]:
    gen = torch.Generator(x.hidden.device).manual_seed(1)
    shape = (x.hidden.shape[0], NUM_ENTRIES)
    stride = x.size.num_classes // NUM_ENTRIES
    ids = torch.randint(0, stride, shape, device=x.hidden.device, generator=gen)
    ids += torch.arange(NUM_ENTRIES, device=ids.device) * stride  # distinct in a row
    probs = torch.rand(shape, device=ids.device, generator=gen).softmax(-1) * 0.8
    options: dict[str, Any] = {
        "alpha": ALPHA,
        "tau": TAU,
        "num_classes": x.size.num_classes,
        "topk_ids": ids,
        "topk_probs": probs,
    }
    return _gradients(
        lambda: linear_topk_inheritance_loss(x.hidden, x.weight, x.labels, **options).loss_sum, x.head_leaves
    )


def ours_label(x: Inputs) -> Callable[[], list[Tensor]]:
    options: dict[str, Any] = {"num_classes": x.size.num_classes}
    return _gradients(lambda: linear_inheritance_loss(x.hidden, x.weight, x.labels, **options).loss_sum, x.head_leaves)


def gemms(x: Inputs) -> Callable[[], list[Tensor]]:
    """Two heads forward, gradients of hidden states and weight: in chunks of 2,048 rows, nothing else."""
    hidden, weight = x.hidden.detach(), x.weight.detach()

    def run() -> list[Tensor]:
        for rows in torch.arange(hidden.shape[0]).split(2048):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = hidden[part] @ weight.T
            torch.mm(x.teacher_hidden[part], x.teacher_weight.T)
            torch.mm(logits, weight)
            torch.mm(logits.T, hidden[part])
        return []

    return run


def liger(chunk_rows: int) -> Callable[[Inputs], Callable[[], list[Tensor]]]:
    def build(x: Inputs) -> Callable[[], list[Tensor]]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=1 - ALPHA,
            weight_soft_loss=ALPHA * TAU**2,
            beta=0.0,
            temperature=TAU,
            chunk_size=chunk_rows,
        )
        return _gradients(
            lambda: module(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels), x.head_leaves
        )

    return build


def liger_label(x: Inputs) -> Callable[[], list[Tensor]]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return _gradients(lambda: module(x.weight, x.hidden, x.labels), x.head_leaves)


def fla_kl(x: Inputs) -> Callable[[], list[Tensor]]:
    from fla.modules import FusedKLDivLoss

    module = FusedKLDivLoss()
    return _gradients(lambda: module(x.hidden, x.teacher_hidden, x.weight, x.teacher_weight), x.head_leaves)


def quack_label(x: Inputs) -> Callable[[], list[Tensor]]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _gradients(
        lambda: chunked_linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum"), x.head_leaves
    )


def cce_label(x: Inputs) -> Callable[[], list[Tensor]]:
    from cut_cross_entropy import linear_cross_entropy

    return _gradients(lambda: linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum"), x.head_leaves)


def torch_label(x: Inputs) -> Callable[[], list[Tensor]]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return _gradients(lambda: F.linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="sum"), x.head_leaves)


# -- rows that start from logits


def _logits(x: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return (x.hidden @ x.weight.T).requires_grad_(), x.teacher_hidden @ x.teacher_weight.T


def ours_full(x: Inputs) -> Callable[[], list[Tensor]]:
    student, teacher = _logits(x)
    options: dict[str, Any] = {"teacher_logits": teacher, "alpha": ALPHA, "tau": TAU, "num_classes": x.size.num_classes}
    return _gradients(lambda: inheritance_loss(student, x.labels, **options).loss_sum, [student])


def our_rows(x: Inputs) -> Callable[[], list[Tensor]]:
    """The kernel alone: terms and gradient of all rows in one pass, as a chunk of `linear` uses it."""
    student, teacher = _logits(x)
    rows = row_functions(resolve_backend("auto", student.device))
    task = RowTask(x.size.num_classes, alpha=ALPHA, tau=TAU)
    grad = torch.empty_like(student)

    def run() -> list[Tensor]:
        rows.dense(student.detach(), x.labels, teacher, task, grad_NV=grad)
        return [grad]

    return run


def eager_full(x: Inputs) -> Callable[[], list[Tensor]]:
    student, teacher = _logits(x)
    return _gradients(lambda: _objective(student, teacher, x.labels, x.size.num_classes), [student])


def copy(x: Inputs) -> Callable[[], list[Tensor]]:
    """As many bytes as `full` must move (two logits read, one written), copied: half of them read, half written."""
    size = x.size.num_rows * x.size.width * 3 // 2
    source = torch.randn(size, device=x.hidden.device).to(x.hidden.dtype)
    target = torch.empty_like(source)

    def run() -> list[Tensor]:
        target.copy_(source)
        return []

    return run


ROWS = [
    Row("ours, linear", "same", "linear", ours_linear),
    Row("ours, top-10", "same", "linear", ours_topk),
    Row("PyTorch eager", "same", "linear", eager),
    Row("torch.compile", "same", "linear", compiled, gpu_only=True),
    Row("Liger JSD, chunks of 1,024", "same", "linear", liger(1024), gpu_only=True),
    Row("Liger JSD, chunks of 4,096", "same", "linear", liger(4096), gpu_only=True),
    Row("ours, labels alone", "part", "linear", ours_label),
    Row("Liger CE", "part", "linear", liger_label, gpu_only=True),
    Row("FLA KL", "part", "linear", fla_kl, gpu_only=True),
    Row("quack CE", "part", "linear", quack_label, gpu_only=True),
    Row("cut-cross-entropy CE", "part", "linear", cce_label, gpu_only=True),
    Row("F.linear_cross_entropy", "part", "linear", torch_label),
    Row("bare GEMMs", "floor", "linear", gemms),
    Row("ours, full", "same", "full", ours_full),
    Row("ours, full, rows alone", "same", "full", our_rows),
    Row("PyTorch eager, full", "same", "full", eager_full),
    Row("copy of full's bytes", "floor", "full", copy),
]


# -- measuring


@dataclass
class Result:
    size: str
    name: str
    kind: str
    group: str
    milliseconds: float
    fastest: float
    slowest: float
    memory_mib: float
    error: float | None
    gigabytes_per_second: float | None


def _flush(device: str) -> None:
    """Push everything out of the caches."""
    torch.empty(64 << 20, dtype=torch.float32, device=device).zero_()


def _milliseconds(run: Callable[[], object], device: str) -> float:
    _flush(device)
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Peak of the tensors' memory during one run, above what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0)) / 2**20


def _error(row: Row, x: Inputs) -> float | None:
    """Relative error of the first rows' gradients against float64, by PyTorch and autograd; for the objective only."""
    if row.kind != "same" or row.build is ours_topk:
        return None
    small = x.rows(min(NUM_ERROR_ROWS, x.size.num_rows), x.hidden.dtype)
    exact = small.rows(NUM_ERROR_ROWS, torch.float64)
    got = row.build(small)()
    if row.group == "full":  # the same rounded logits
        logits = [t.detach().double() for t in _logits(small)]
        logits[0].requires_grad_()
        loss = _objective(logits[0], logits[1], exact.labels, x.size.num_classes)
        want = torch.autograd.grad(loss, logits[:1])
    else:
        want = tuple(eager(exact)())
    mean = 1.0 if "Liger" not in row.name else exact.labels.shape[0]  # Liger returns a mean
    return max(float((g.double() * mean - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def _wanted(device: str, pattern: str) -> Iterator[Row]:
    for row in ROWS:
        if pattern.lower() not in row.name.lower() and pattern != row.group:
            continue
        if row.gpu_only and device != "cuda":
            print(f"skipped: {row.name} (needs a GPU)")
            continue
        yield row


def measure(size: Size, dtype: torch.dtype, device: str, repeats: int, pattern: str) -> list[Result]:
    """All rows of one size, in turns."""
    x = Inputs.make(size, dtype, device)
    runs: dict[Row, Callable[[], list[Tensor]]] = {}
    memory: dict[Row, float] = {}
    error: dict[Row, float | None] = {}
    times: dict[Row, list[float]] = {}
    for row in _wanted(device, pattern):
        try:
            run = row.build(x)
            run()  # compiles
            memory[row], error[row], times[row] = peak_mib(run, device), _error(row, x), []
            runs[row] = run
        except (ImportError, Skip, RuntimeError, AttributeError, TypeError) as reason:
            print(f"skipped: {row.name} ({type(reason).__name__}: {' '.join(str(reason).split())[:200]})")
    for _ in range(repeats):
        for row, run in runs.items():
            times[row].append(_milliseconds(run, device))
    element = torch.finfo(dtype).bits // 8
    moved = 3 * element * size.num_rows * size.width
    results = []
    for row in runs:
        median = statistics.median(times[row])
        rate = moved / median / 1e6 if row.group == "full" else None
        results.append(
            Result(str(size), row.name, row.kind, row.group, median, min(times[row]), max(times[row]), memory[row],
                   error[row], rate)
        )  # fmt: skip
    return results


def table(results: list[Result]) -> str:
    """One line a row; ratios against PyTorch eager of the same size and start."""
    columns = ["size", "row", "objective", "ms (fastest-slowest)", "of eager", "MiB above inputs", "error", "GB/s"]
    eagers = {(r.size, r.group): r.milliseconds for r in results if r.name.startswith("PyTorch eager")}

    def cells(r: Result) -> list[str]:
        base = eagers.get((r.size, r.group))
        return [
            r.size,
            r.name,
            r.kind,
            f"{r.milliseconds:.2f} ({r.fastest:.2f}-{r.slowest:.2f})",
            f"{r.milliseconds / base:.2f}" if base else "",
            f"{r.memory_mib:.0f}",
            "" if r.error is None else f"{r.error:.1e}",
            "" if r.gigabytes_per_second is None else f"{r.gigabytes_per_second:.0f}",
        ]

    return markdown(columns, map(cells, results))


def main() -> int:
    """Command line; see --help."""
    options = parser(__doc__)
    on_gpu = torch.cuda.is_available()
    options.add_argument("--size", choices=sorted(SIZES), default="paper" if on_gpu else "small")
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16" if on_gpu else "float32")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    options.add_argument("--repeats", type=int, default=20 if on_gpu else 5, help="timings a row")
    options.add_argument("--only", default="", help="rows whose name contains this, or a group: linear, full")
    args = options.parse_args()
    threads, backend = torch.get_num_threads(), resolve_backend("auto", args.device)
    head = heading(threads=threads, dtype=args.dtype, backend=backend)
    results: list[Result] = []
    for size in SIZES[args.size]:
        print(f"measuring {size}", flush=True)
        results += measure(size, DTYPES[args.dtype], args.device, args.repeats, args.only)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        write_results(args.out, head, results=results)
    show(head, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
