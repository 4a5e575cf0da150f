"""What must stay true of optimus.devices. Derived in notebooks/12d_devices.ipynb."""
from types import SimpleNamespace

import pytest
import torch

from optimus import devices, training
from optimus.training import amp_dtype


def test_precision_follows_the_device(monkeypatch):
    assert amp_dtype("auto", torch.device("cpu")) is None
    assert amp_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert amp_dtype("off", torch.device("cuda")) is None
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        supported = lambda including_emulation, native=native: native
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert amp_dtype("auto", torch.device("cuda")) is dtype


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    facts = SimpleNamespace(name="Some GPU", total_memory=80_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert devices.describe_device(torch.device("cuda")) == "Some GPU with 80,000 bytes"


@pytest.mark.parametrize("cuda, mps, wanted, why", [
    (True, True, "cuda", "a CUDA GPU"), (False, True, "mps", "no CUDA GPU, but torch can use Apple's GPU"),
    (False, False, "cpu", "neither")])
def test_the_best_device_is_cuda_then_mps_then_the_cpu(monkeypatch, cuda, mps, wanted, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device = devices.best_device()
    assert device.type == wanted and why in devices.why_device(device)
    for kind, there in (("cuda", cuda), ("mps", mps), ("cpu", True)):
        assert devices.is_device_available(torch.device(kind)) == there
    if not mps:
        with pytest.raises(ValueError, match=r"device is mps, but this machine has no Apple \(mps\) GPU"):
            devices.check_device(torch.device("mps"))


def test_precision_memory_and_random_state_on_mps(monkeypatch):
    mps, seen = torch.device("mps"), []
    assert amp_dtype("auto", mps) is None and amp_dtype("bf16", mps) is torch.bfloat16
    with pytest.raises(ValueError, match="amp is 'fp16'; on mps it must be"): amp_dtype("fp16", mps)
    assert training.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "mps state")
    monkeypatch.setattr(torch.mps, "set_rng_state", seen.append)
    with devices.isolated_rng(mps): drawn = torch.rand(3)
    assert seen == ["mps state"] and torch.equal(drawn, torch.rand(3))
    devices.set_rng_state(mps, {"cpu": torch.get_rng_state(), "cuda": ["of another machine"]})
    assert seen == ["mps state"]
