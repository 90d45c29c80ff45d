import pytest
import torch
import transformers


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models of a few thousand weights: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def quiet():
    """No progress bars between the dots."""
    transformers.logging.disable_progress_bar()
