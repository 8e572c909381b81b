"""Fake tensors rebuilt from cached results equal those of ``FakeTensorMode``."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from lowmem_drf.planner.fakes import READ_LIMIT, REAL_LIMIT, Fakes
from lowmem_drf.planner.ledger import Ledger

MIB = 1024**2


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake(mode, *shape, dtype=torch.float32):
    with mode:
        return torch.empty(shape, dtype=dtype)


def look(tensor):
    """All properties of a fake tensor."""
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.device,
        tensor.untyped_storage().nbytes(),
    )


OPERATIONS = {
    "pointwise": lambda x: x * 2.0,
    "promotion of an int": lambda x: x.to(torch.int64) + 1,
    "promotion of a float": lambda x: x.to(torch.int64) + 1.0,
    "promotion of a bool": lambda x: x.to(torch.int64) + True,
    "reduction": lambda x: x.mean(-1),
    "cast": lambda x: x.to(torch.bfloat16),
    "strides kept": lambda x: x.transpose(0, 1).clone(),
    "strides made new": lambda x: x.transpose(0, 1).contiguous(),
    "view": lambda x: x.view(-1),
    "view with an offset": lambda x: x[1:, 2],
    "views": lambda x: x.chunk(2)[1],
    "view of a view": lambda x: x.permute(2, 0, 1)[1:].unflatten(1, (2, 2)),
    "product": lambda x: x @ x.transpose(-1, -2),
    "several results": lambda x: x.max(-1).values + x.sort().values.sum(),
    "list": lambda x: torch.cat([x, x[:1]]),
    "real tensors among its arguments": lambda x: x * torch.arange(6) + torch.ones(()),
    "real places": lambda x: x[torch.tensor([0, 2, 2])],
    "real mask": lambda x: x[torch.tensor([True, False, True, True])],
    "factory": lambda x: x.new_zeros(3, 5),
    "convolution": lambda x: F.conv1d(x, x[:3, :, :2], stride=2),
    **{
        f"direct: {name}": run
        for name, run in {
            "mixed strides": lambda x: x.transpose(0, 1) + x[:, 0].unsqueeze(0).expand(5, 4, 6).bfloat16(),
            "channels last": lambda x: (x[None].to(memory_format=torch.channels_last) * 2).clone().detach(),
            "in place": lambda x: x.clone().mul_(2).add_(x[:1]).copy_(x[0]),
            "addmm": lambda x: torch.addmm(x[0, 0, :5], x[0], x[1].t()).clamp(0, 1).pow(2),
            "sums": lambda x: (x / x.sum((0, 2), keepdim=True) - x.mean((1,), keepdim=True)).mean(),
            "log_softmax": lambda x: x.bfloat16().log_softmax(-1, torch.float32),
            "split": lambda x: torch.zeros_like(x.split(3)[1]).select(1, 2),
            "backward of a slice": lambda x: torch.ops.aten.slice_backward(x, [9, 5, 6], 0, 1, 5, 1),
        }.items()
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_time_is_as_the_first_and_as_under_the_plain_mode(mode, name):
    run, x = OPERATIONS[name], fake(mode, 4, 5, 6)
    with mode:
        plain = run(x) if name != "real mask" else x[torch.tensor([0, 2, 3])]
    if name.startswith("direct"):
        real = run(torch.ones(x.shape))
        assert (real.shape, real.stride(), real.dtype) == (plain.shape, plain.stride(), plain.dtype)
    with Fakes(mode):
        first, second = run(x), run(x)
    assert isinstance(second, FakeTensor) and second is not first
    assert look(first) == look(second) == look(plain)
    assert vars(first).keys() == vars(second).keys()


def test_only_views_share_a_storage(mode):
    x = fake(mode, 4, 6)
    with Fakes(mode):
        for _ in range(2):
            view, copied = x[1:].t(), x.clone()
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata != copied.untyped_storage()._cdata
            assert view._base is x


def test_an_operator_in_place_gives_back_what_it_was_given(mode):
    x, y = fake(mode, 4, 6), fake(mode, 4, 6)
    with Fakes(mode):
        for tensor in (x, y):
            assert tensor.add_(1) is tensor and tensor._version == 1


def test_an_operator_that_returns_nothing_is_counted_again(mode):
    """The step of bitsandbytes' optimizers is one."""
    x = [fake(mode, 4, 6)]
    with Fakes(mode) as fakes, Ledger(fakes=fakes) as ledger:
        for _ in range(2):
            torch._foreach_add_(x, 1.0)
        assert ledger.card_bytes == 0


def test_what_changes_its_arguments_shape_is_not_remembered(mode):
    x, y = fake(mode, 4, 6), fake(mode, 4, 6)
    with Fakes(mode):
        for tensor in (x, y):
            assert tensor.t_().shape == tensor.shape == (6, 4)


def test_the_default_dtype_is_part_of_the_question(mode):
    whole = fake(mode, 3, dtype=torch.int64)
    with Fakes(mode):
        assert (whole * 0.5).dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert (whole * 0.5).dtype is torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_real_and_fake_arguments_are_told_apart(mode):
    """Results of real tensors alone stay real."""
    x = fake(mode, 3)
    with Fakes(mode):
        for _ in range(2):
            assert isinstance(x + 1, FakeTensor) and (torch.ones(3) + 1).tolist() == [2, 2, 2]


def test_what_is_made_from_nothing_is_fake_when_it_is_large(mode):
    with Fakes(mode):
        for _ in range(2):
            assert isinstance(torch.zeros(REAL_LIMIT + 1), FakeTensor) and torch.arange(4).tolist() == [0, 1, 2, 3]


def test_large_floating_results_of_real_tensors_are_fake(mode):
    """But a copy, which takes the place of a real buffer, and what is written to."""
    x = torch.ones(READ_LIMIT + 1)
    with Fakes(mode):
        for _ in range(2):
            assert isinstance(x * 2, FakeTensor) and not isinstance(x > 0, FakeTensor)
            assert not any(isinstance(one, FakeTensor) for one in (x.clone(), x.add_(1), x[1:]))


def test_checks_of_values_pass(mode):
    x = fake(mode, 3, 100)
    with Fakes(mode), Ledger():
        for _ in range(2):
            assert x.isfinite().all() and x.sum().item() == 1


def test_gradients_and_bytes_are_the_plain_modes(mode):
    """A graph with recomputation, twice: the second run uses only cached results."""

    def run(x, w):
        y = torch.utils.checkpoint.checkpoint(lambda x: F.gelu(x @ w).softmax(-1), x, use_reentrant=False)
        y = F.scaled_dot_product_attention(y[None, None], y[None, None], y[None, None])
        return torch.autograd.grad((y * y).sum(), w)[0]

    counted = []
    for entered in (mode, Fakes(mode), Fakes(mode)):
        x, w = fake(mode, 256, 64), fake(mode, 64, 64).requires_grad_()
        with entered:
            for _ in range(2):
                with Ledger(512) as ledger:
                    grad = run(x, w)
                    counted.append((look(grad), ledger.peak_card_bytes, ledger.card_bytes, ledger.flops))
                    del grad
    assert len(set(counted)) == 1
