"""Without a card, kernels are interpreted. Uninitialised memory holds NaN, which shows what a kernel does not write."""

import pytest
import torch

with torch.device(
    "meta"
):  # PyTorch lists once, now, what a device context changes: later the list would hold the poisoned
    torch.empty(0)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make):
    def made(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and tensor.device.type != "meta":
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif not tensor.is_complex() and tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return made
