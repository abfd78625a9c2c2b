"""What needs a GPU: `make test-gpu`. With --device cpu the same tests run without one."""

import copy

import pytest
import torch

HERE = __name__.rpartition(".")[0].replace(".", "/")


def pytest_collection_modifyitems(config, items):
    """Every test of this folder is marked gpu, and skipped where its device is not there."""
    device = config.getoption("--device")
    for item in items:
        if not item.nodeid.startswith(f"{HERE}/"):
            continue
        item.add_marker("gpu")
        if device == "cuda" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU with CUDA"))


@pytest.fixture
def device(request):
    """What the tests run on, to be compared with the CPU."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _full_precision():
    """No TF32, whose ten bits of mantissa would hide what else differs."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        yield


@pytest.fixture
def same_random_numbers(monkeypatch):
    """A step's are drawn on the CPU: a GPU's generator makes others of the same seed."""

    def randn_like(tensor):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    def randperm(n, *, device):
        return torch_randperm(n, generator=torch.Generator().manual_seed(0)).to(device)

    torch_randperm = torch.randperm
    # The region branch's noise, and the RPN's choice of anchors.
    monkeypatch.setattr(torch, "randn_like", randn_like)
    monkeypatch.setattr(torch, "randperm", randperm)


@pytest.fixture
def on_both(device):
    """A function that returns a model of the CPU and its copy on the device."""

    def copies(model):
        return model, copy.deepcopy(model).to(device)

    return copies
