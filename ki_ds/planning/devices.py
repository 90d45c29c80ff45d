"""Peaks of known GPUs, for plans."""

from __future__ import annotations

import torch

from ki_ds.errors import UserError

# Peak TFLOP/s without sparsity of NVIDIA's data sheets, by a part of the name: (bfloat16 and float16, float32).
PEAK_TFLOPS = {
    "B200": (2250.0, 75.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H800": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}


def device_named(given: str | None) -> tuple[str, bool]:
    """(name, whether it is a GPU): as given, or what this machine has."""
    if given is None:
        here = torch.cuda.is_available()
        return (torch.cuda.get_device_name() if here else "cpu"), here
    if given.lower() in ("gpu", "cuda"):
        return (torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"), True
    if given.lower() != "cpu" and peak_flops_of(given, "bf16") is None:
        raise UserError(
            f"--device {given} is not known; give cpu, gpu (with --peak_tflops), or one of {', '.join(PEAK_TFLOPS)}"
        )
    return given, given.lower() != "cpu"


def peak_flops_of(name: str, precision: str) -> float | None:
    """A GPU's peak FLOP/s in a precision, by a part of its name; None for one that is not in `PEAK_TFLOPS`."""
    plain = _words(name)
    for known, (half, single) in PEAK_TFLOPS.items():
        if all(word in plain.split() for word in _words(known).split()):
            return 1e12 * (single if precision == "fp32" else half)
    return None


def _words(name: str) -> str:
    """A GPU's name in lower case words."""
    return " ".join(name.lower().replace("-", " ").replace("_", " ").split())
