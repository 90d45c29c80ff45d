import os

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models of a few thousand weights: threads would only wait for each other."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")  # else accelerate chooses
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)
