"""How rows are tiled; and that the kernels compile for an H100 without spilling, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from ki_ds.objective.rows import cap_slope  # noqa: E402
from ki_ds.objective.triton_rows import Tiling, capped, through_cap  # noqa: E402

COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ki_ds.objective import triton_dense
from ki_ds.objective import triton_scale
from ki_ds.objective import triton_topk

POINTERS = {"labels_ptr": "*i64", "ids_ptr": "*i64", "student_ptr": "*bf16", "teacher_ptr": "*bf16",
            "grad_ptr": "*bf16", "tensor_ptr": "*bf16"}
EVEN = ("num_columns", "teacher_columns", "num_elements")
FLOATS = ("alpha_value", "tau", "smoothing", "grad_scale")


def compile_kernel(kernel, num_warps, **constants):
    names = kernel.arg_names
    kinds = {n: POINTERS.get(n, "*fp32") if n.endswith("_ptr") else "fp32" if n in FLOATS else "i32" for n in names}
    aligned = [i for i, n in enumerate(names) if n.endswith(("_ptr", "_stride")) or n in EVEN]
    source = ASTSource(
        kernel,
        kinds | {n: "constexpr" for n in constants},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    report = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    return report | {"wide": len(re.findall(r"ld.global[^;]*v4.b32", binary.asm["ptx"]))}


tiling = triton_dense.DEFAULT_TILING
common = dict(HAS_ROW_SCALE=True, SMOOTHING=False, WRITE_GRAD=True, TAU_IS_2=True, ALPHA_IS_TENSOR=True,
              ADDED=(0.0,), CAP=0.0, TEACHER_CAP=0.0, T=tiling.lanes, E=tiling.width, STAGES=tiling.num_stages)
entries = {name: value for name, value in common.items() if name != "TEACHER_CAP"}
print(json.dumps({
    "dense": compile_kernel(triton_dense._dense_kernel, tiling.num_warps, HAS_TEACHER=True, **common),
    "dense_tau": compile_kernel(triton_dense._dense_kernel, tiling.num_warps, HAS_TEACHER=True,
                                **(common | {"TAU_IS_2": False, "SMOOTHING": True, "ADDED": (0.3,)})),
    "label": compile_kernel(triton_dense._dense_kernel, tiling.num_warps, HAS_TEACHER=False, **common),
    "tail": compile_kernel(triton_topk._topk_kernel, tiling.num_warps, TAIL=True, RENORMALISE=False, K=128, **entries),
    "capped": compile_kernel(triton_dense._dense_kernel, tiling.num_warps, HAS_TEACHER=True,
                             **(common | {"CAP": 30.0, "TEACHER_CAP": 30.0})),
    "capped_tail": compile_kernel(triton_topk._topk_kernel, tiling.num_warps, TAIL=True, RENORMALISE=False, K=128,
                                  **(entries | {"CAP": 30.0})),
    "scale": compile_kernel(triton_scale._scale_kernel, 8, BLOCK=triton_scale.BLOCK),
}))
"""


def test_a_tile_is_what_its_warps_read_at_once():
    assert Tiling(num_warps=16, lanes_per_thread=1, width=8).lanes * 8 == 4096
    assert Tiling(num_warps=4, lanes_per_thread=2).lanes == 256


@triton.jit
def _cap_kernel(product_ptr, logit_ptr, slope_ptr, CAP: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    product = tl.load(product_ptr + at)
    tl.store(logit_ptr + at, capped(product, CAP, True))
    tl.store(slope_ptr + at, through_cap(product * 0.0 + 1.0, product, CAP))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested by tests/gpu")
def test_a_float32_cap_has_all_its_digits_everywhere():
    product = torch.cat([torch.logspace(-30, 3, 511), torch.zeros(1)])
    product = torch.cat([product, -product])
    logit, slope = torch.empty_like(product), torch.empty_like(product)
    _cap_kernel[(1,)](product, logit, slope, CAP=30.0, N=1024)
    x = product.double() / 30.0
    for found in (logit, 30.0 * torch.tanh(product / 30.0)):  # PyTorch's is no better
        torch.testing.assert_close(found.double(), 30.0 * torch.tanh(x), rtol=6e-7, atol=0.0)
    for found in (slope, cap_slope(product, 30.0)):
        torch.testing.assert_close(found.double(), torch.cosh(x).pow(-2), rtol=2e-5, atol=1e-37)
    product[0] = -torch.inf  # what was taken out of a row stays out
    _cap_kernel[(1,)](product[:1], logit, slope, CAP=30.0, N=1)
    assert float(logit[0]) == -torch.inf


def test_the_kernels_compile_for_an_h100_and_spill_nothing():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    threads = 32 * Tiling().num_warps
    for name, usage in report.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, (name, usage)
        assert usage["REG"] * threads <= 65536 // 2 or name == "scale", (name, usage)  # two programs fit an SM
        assert usage["wide"] > 0, (name, usage)  # 16 bytes a load
