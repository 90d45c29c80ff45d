"""Which implementation of the rows runs."""

import importlib.util
import os
from functools import cache

import torch

from ki_ds.errors import UserError

BACKENDS = ("auto", "triton", "torch")


@cache
def has_triton() -> bool:
    """True if Triton can be imported; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """True if Triton was told to run its kernels on the CPU, through its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The implementation that will run for tensors on `device`: "triton" or "torch".

    "auto" means Triton's kernels on a CUDA device when Triton is installed, and plain PyTorch
    otherwise. Raises `UserError` when "triton" is asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    on_cuda = torch.device(device).type == "cuda"
    if backend == "auto":
        return "triton" if on_cuda and has_triton() else "torch"
    if backend == "triton" and not has_triton():
        raise UserError('backend="triton" needs the package triton; install ki_ds[triton] or take backend="auto"')
    if backend == "triton" and not on_cuda and not interprets():
        raise UserError(
            f'backend="triton" needs CUDA tensors, these are on {device}; take backend="auto", '
            "or set TRITON_INTERPRET=1 before Triton is imported"
        )
    return backend
