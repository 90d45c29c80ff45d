import pytest
import torch

from ki_ds.errors import UserError
from ki_ds.planning.devices import device_named, peak_flops_of


def test_peaks_by_name():
    assert peak_flops_of("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops_of("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops_of("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_of("Voodoo 2", "bf16") is None


def test_a_device_is_what_is_given_or_what_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named(None) == ("cpu", False)
    assert device_named("cpu") == ("cpu", False)
    assert device_named("gpu") == ("gpu", True)
    assert device_named("H100") == ("H100", True)
    with pytest.raises(UserError, match="--device Voodoo is not known; give cpu, gpu"):
        device_named("Voodoo")
