"""``norm_silu`` against its naive form, in every memory layout that it takes without a copy."""

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lowmem_drf.kernels.norm_silu import norm_silu, norm_silu_backward, norm_silu_forward, norm_silu_naive

SHAPES = {
    "one of each": (1, 1, 1, 1, 1),
    "63 positions": (1, 96, 1, 7, 9),
    "100 positions, two clips": (2, 24, 1, 10, 10),
    "1000 positions in frames": (1, 16, 4, 10, 25),
    "more positions than a tile": (1, 192, 2, 8, 11),
    "not a power of two": (1, 384, 1, 5, 7),
    "wide": (1, 1024, 1, 3, 5),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(shape, dtype, device="cpu", seed=0):
    """(x, gamma, upstream gradient)."""
    generator = torch.Generator().manual_seed(seed)
    x, d = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return 3 * x, (1 + 0.3 * torch.randn(shape[1], generator=generator)).to(device, dtype), d


def run(function, x, gamma, d, silu=True, dtype=None):
    """y and the gradients of x and gamma."""
    x, gamma = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in (x, gamma))
    y = function(x, gamma, silu)
    return y.detach(), *torch.autograd.grad(y, (x, gamma), d.to(y.dtype))


def check(x, gamma, d, silu=True):
    got, eager = (run(function, x, gamma, d, silu) for function in (norm_silu, norm_silu_naive))
    exact = run(norm_silu_naive, x, gamma, d, silu, torch.float64)
    for name, *three in zip(("y", "dx", "dgamma"), got, exact, eager, strict=True):
        assert_within_budget(name, *three)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_naive_form(shape, dtype, device):
    check(*tensors(shape, dtype, device))


def test_the_norm_alone(device):
    check(*tensors((1, 24, 2, 5, 7), torch.float32, device), silu=False)


def test_the_naive_form_is_diffusers(device):
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    x, gamma, _ = tensors((2, 24, 2, 5, 7), torch.float64, device)
    norm = WanRMS_norm(24, images=False).to(device, torch.float64)
    norm.gamma.data.copy_(gamma.view(-1, 1, 1, 1))
    assert torch.allclose(norm_silu_naive(x, gamma), F.silu(norm(x)), rtol=1e-14, atol=1e-14)
    assert torch.allclose(norm_silu_naive(x, gamma, silu=False), norm(x), rtol=1e-14, atol=1e-14)


LAYOUTS = {
    "rows": lambda x: x[:, :, :, 3:9],
    "frames": lambda x: x[:, :, 1:],
    "columns": lambda x: x[..., 1:6],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "frames before channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows and columns swapped": lambda x: x.transpose(3, 4),
    "one column": lambda x: x[..., 2:3],
    "every other channel": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout(layout, device):
    x, gamma, d = tensors((2, 16, 3, 12, 8), torch.float32, device)
    x, d = layout(x), layout(d)
    gamma = gamma[: x.shape[1]]
    got = check(x, gamma, d)
    mixed = run(norm_silu, x, gamma, d.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got[:2], mixed[:2], strict=True))


def test_gamma_of_another_dtype_and_not_contiguous(device):
    x, _, d = tensors((1, 16, 1, 4, 5), torch.bfloat16, device)
    gamma = (1 + torch.randn(32, generator=torch.Generator().manual_seed(3))).to(device)[::2]
    got, exact = run(norm_silu, x, gamma, d), run(norm_silu_naive, x, gamma, d, dtype=torch.float64)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for name, *three in zip(("y", "dx", "dgamma"), got, exact, run(norm_silu_naive, x, gamma, d), strict=True):
        assert_within_budget(name, *three)


def test_an_expanded_upstream_gradient(device):
    x, gamma, _ = tensors((2, 8, 2, 3, 5), torch.float32, device)
    check(x, gamma, torch.tensor(1.7, device=device).expand(x.shape))


def test_positions_without_values(device):
    """Where |x| is clamped there is no gradient along x, as in ``F.normalize``; values near the bound keep theirs."""
    x, gamma, d = tensors((1, 8, 1, 2, 3), torch.float32, device)
    x[..., 0, :] = 0
    x[..., 1, 0] *= 1e-14
    y, dx, _ = check(x, gamma, d * 1e-6)
    assert not y[..., 0, :].any() and dx[..., 0, :].all()


@pytest.mark.parametrize(("wants_x", "wants_gamma"), [(True, False), (False, True)])
def test_an_unwanted_gradient_is_not_computed(wants_x, wants_gamma, device):
    x, gamma, d = tensors((1, 24, 2, 4, 5), torch.float32, device)
    _, dx, dgamma = run(norm_silu, x, gamma, d)
    own_dx, own_dgamma = norm_silu_backward(d, x, gamma, True, wants_x, wants_gamma)
    assert torch.equal(own_dx, dx) if wants_x else own_dx.numel() == 0
    assert torch.equal(own_dgamma, dgamma) if wants_gamma else own_dgamma.numel() == 0
    x.requires_grad_(wants_x)
    gamma.requires_grad_(wants_gamma)
    norm_silu(x, gamma).backward(d)
    assert (x.grad is None, gamma.grad is None) == (not wants_x, not wants_gamma)
    assert torch.equal(x.grad if wants_x else gamma.grad, dx if wants_x else dgamma)


def test_its_input_is_all_it_keeps(device):
    x, gamma, _ = tensors((1, 24, 2, 4, 5), torch.bfloat16, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_silu(x.requires_grad_(), gamma)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), gamma.data_ptr()}
    assert sum(tensor.nbytes for tensor in kept) == 2 * (x.numel() + 24)


def test_no_gradient_keeps_nothing(device):
    x, gamma, _ = tensors((1, 24, 2, 4, 5), torch.bfloat16, device)
    assert norm_silu(x, gamma).grad_fn is None


def test_empty(device):
    x, gamma, d = tensors((1, 8, 0, 4, 5), torch.float32, device)
    y, dx, dgamma = run(norm_silu, x, gamma, d)
    assert y.shape == dx.shape == x.shape and not dgamma.any()


@pytest.mark.parametrize("layout", [LAYOUTS["rows"], LAYOUTS["channels last"]], ids=["rows", "channels last"])
def test_the_operators_are_registered_as_they_behave(layout, device):
    x, gamma, d = tensors((1, 16, 2, 12, 8), torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(norm_silu_forward, (layout(x), gamma, True), test_utils=checks)
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(norm_silu_backward, (layout(d), layout(x), gamma, True, *wants), test_utils=checks)


def test_fake_tensors_pass():
    with FakeTensorMode():
        x = torch.empty(1, 96, 4, 480, 832, dtype=torch.bfloat16, requires_grad=True)
        gamma = torch.empty(96, requires_grad=True)
        y = norm_silu(x, gamma)
        dx, dgamma = torch.autograd.grad(y, (x, gamma), torch.empty_like(y))
    assert (y.shape, y.dtype) == (dx.shape, dx.dtype) == (x.shape, x.dtype)
    assert (dgamma.shape, dgamma.dtype) == (gamma.shape, gamma.dtype)


X, GAMMA = torch.ones(1, 8, 1, 2, 2), torch.ones(8)


@pytest.mark.parametrize(
    ("x", "gamma", "error", "message"),
    [
        (X.double(), GAMMA, TypeError, "norm_silu_naive"),
        (X, GAMMA.double(), TypeError, "gamma_C is torch.float64"),
        (X.int(), GAMMA, TypeError, "torch.int32"),
        (X[0], GAMMA, ValueError, "B, C, T, H, W"),
        (X, GAMMA[:4], ValueError, r"\(4,\)"),
        (X, GAMMA.view(8, 1, 1, 1), ValueError, "gamma of shape"),
        (torch.ones(1, 1025, 1, 1, 1), torch.ones(1025), ValueError, "1024 channels"),
        (X.to("meta"), GAMMA, ValueError, "meta"),
        (X.to("meta"), GAMMA.to("meta"), ValueError, "meta"),
    ],
)
def test_what_it_cannot_take_is_refused_before_launch(x, gamma, error, message, monkeypatch):
    monkeypatch.setattr(torch.ops.lowmem_drf, "norm_silu_forward", None)
    with pytest.raises(error, match=message):
        norm_silu(x, gamma)


@pytest.mark.parametrize("known", [None, 1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "a strip"])
def test_behind_past_frames_it_is_the_concatenation(known, layout, device):
    """To the bit: values and all gradients."""
    x, gamma, _ = tensors((2, 16, 2, 6, 5), torch.float32, device)
    x = {"channels last": LAYOUTS["channels last"], "a strip": lambda x: x[:, :, :, 1:5]}.get(layout, lambda x: x)(x)
    past = None if known is None else torch.randn_like(x[:, :, :known])
    given = [tensor.requires_grad_() for tensor in (x, gamma, *([] if past is None else [past]))]
    joined = norm_silu(x, gamma, before=2, past_BCTHW=past)
    zeros = x.new_zeros(2, 16, 2 - (known or 0), *x.shape[3:])
    wanted = torch.cat([zeros, *given[2:], norm_silu(x, gamma)], dim=2)
    assert torch.equal(joined, wanted)
    d = torch.randn_like(joined)
    pairs = zip(torch.autograd.grad(joined, given, d), torch.autograd.grad(wanted, given, d), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_past_frames_of_another_kind_are_refused(device):
    x, gamma, _ = tensors((1, 16, 2, 6, 5), torch.float32, device)
    for past in (x[:, :, :, :3], x.half(), x[:, :8]):
        with pytest.raises(ValueError, match="past frames"):
            norm_silu(x, gamma, before=2, past_BCTHW=past)
    with pytest.raises(ValueError, match="of 1 frames"):
        norm_silu(x, gamma, before=1, past_BCTHW=x)
