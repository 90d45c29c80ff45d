import subprocess
import sys

import pytest

from ki_ds.errors import UserError
from ki_ds.objective import backend


def test_auto_is_triton_on_cuda_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert backend.resolve_backend("auto", "cuda:0") == "triton"
    assert backend.resolve_backend("auto", "cpu") == "torch"
    assert backend.resolve_backend("torch", "cuda:0") == "torch"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert backend.resolve_backend("auto", "cuda:0") == "torch"


def test_triton_forced_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="needs CUDA tensors, these are on cpu"):
        backend.resolve_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve_backend("triton", "cpu") == "triton"
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(UserError, match="needs the package triton"):
        backend.resolve_backend("triton", "cuda")


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="backend='cuda' is not one of auto, triton, torch"):
        backend.resolve_backend("cuda", "cpu")


def test_the_loss_works_where_triton_is_not_installed():
    program = """
import sys
sys.modules["triton"] = None  # an import of it now fails
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from ki_ds.loss import inheritance_loss, resolve_backend
assert resolve_backend("auto", "cuda") == "torch"
z = torch.randn(3, 5, requires_grad=True)
inheritance_loss(z, torch.tensor([0, 1, 2]), teacher_logits=torch.randn(3, 5), alpha=0.5).loss_sum.backward()
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
