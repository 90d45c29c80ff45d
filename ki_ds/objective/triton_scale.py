"""Multiplying a stored gradient by what backward brings, in place and without waiting for the device."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor (0-d float32, on the device), in float32; where the factor is 1 no memory is touched."""
    assert tensor.is_contiguous()
    num_elements = tensor.numel()
    if num_elements:
        _scale_kernel[(triton.cdiv(num_elements, BLOCK),)](tensor, factor, num_elements, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _scale_kernel(tensor_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_elements
        value = tl.load(tensor_ptr + at, mask=inside).to(tl.float32) * factor
        tl.store(tensor_ptr + at, value.to(tensor_ptr.dtype.element_ty), mask=inside)
