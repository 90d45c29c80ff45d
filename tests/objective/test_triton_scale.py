import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from ki_ds.objective.triton_scale import scale_  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are tested by tests/gpu")


@pytest.mark.parametrize("size", [0, 1, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_element_is_scaled_in_float32(size, dtype):
    tensor = torch.full((size,), 2.0**-12, dtype=dtype)
    scale_(tensor, torch.tensor(2.0**17))
    assert tensor.tolist() == [2.0**5] * size
