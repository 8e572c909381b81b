"""8-bit products against the same integers in fp64, and against the layer's own values within what rounding costs."""

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lowmem_drf.kernels import int8_linear as module
from lowmem_drf.kernels.int8_linear import (
    GROUP,
    int8_linear,
    int8_linear_naive,
    int8_product,
    int8_product_op,
    quantise_rows,
    quantise_rows_op,
)

SHAPES = {
    "one of each": (1, 1, 1),
    "ragged": (130, 300, 150),
    "even": (8, 256, 128),
    "rows of two parts": (1100, 20, 130),
}
"""(N, in, out)."""


def tensors(shape, dtype=torch.float16, seed=0):
    """x, w8, scale, bias, d_y; a channel of x and one of d_y is 50 times as large as the others."""
    N, inside, outside = shape
    generator = torch.Generator().manual_seed(seed)
    x, w, bias, d = (
        torch.randn(size, generator=generator) for size in ((N, inside), (outside, inside), (outside,), (N, outside))
    )
    x[:, inside // 2] *= 50
    d[:, outside // 3] *= 50
    scale = w.abs().amax(1)
    return x.to(dtype), (w * (127 / scale)[:, None]).round().to(torch.int8), scale, bias.to(dtype), d.to(dtype)


def with_gradient(function, x, w8, scale, bias, d):
    x = x.clone().requires_grad_()
    y = function(x, w8, scale, bias)
    return y.detach(), torch.autograd.grad(y, x, d)[0]


def kernels(x, w8, scale, bias, d, quantise=quantise_rows):
    """On a CPU ``int8_linear`` takes plain PyTorch; these are the kernels, interpreted there."""
    y = int8_product(*quantise(x, None), w8, scale, bias, x.dtype, True)
    return y, int8_product(*quantise(d, scale), w8, None, None, x.dtype, False)


@pytest.fixture(params=range(len(module.TILES)), ids=lambda n: f"tile{n}")
def tile(request, monkeypatch):
    monkeypatch.setattr(module._tuned_product, "configs", module._tuned_product.configs[request.param :][:1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernels_are_the_formula(shape, device, tile):
    """Many rows are quantised in plain PyTorch: the interpreter takes one after another."""
    dtype, quantise = (torch.float16, quantise_rows) if shape[0] < 100 else (torch.float32, quantise_rows_op)
    given = [tensor.to(device) for tensor in tensors(shape, dtype)]
    wide = [tensor.double() if tensor.dtype == dtype else tensor for tensor in given]
    exact, eager = (with_gradient(int8_linear_naive, *inputs) for inputs in (wide, given))
    for name, *found in zip(("y", "dx"), kernels(*given, quantise), exact, eager, strict=True):
        assert_within_budget(name, *found)


def test_what_rounding_costs(device):
    """Half a step in each element of a group; a large channel takes the precision of its own group alone."""
    x, w8, scale, bias, d = (tensor.to(device) for tensor in tensors((10, 512, 64), torch.float32))
    weight = w8.double() * (scale.double() / 127)[:, None]
    for rounded, exact, outlier in (
        (quantise_rows(x), x.double(), 512 // 2),
        (quantise_rows(d, scale), d.double() * scale.double() / 127, 64 // 3),
    ):
        step = rounded[1].double().t().repeat_interleave(GROUP.value, 1)[:, : exact.shape[1]]
        assert bool(((rounded[0] * step - exact).abs() <= 0.5001 * step).all())
        large = torch.arange(exact.shape[1], device=device) // GROUP.value == outlier // GROUP.value
        assert large.all() or step[:, large].mean() > 5 * step[:, ~large].mean()
    y, dx = kernels(x, w8, scale, bias, d)
    for found, exact in ((y, x.double() @ weight.t() + bias), (dx, d.double() @ weight)):
        assert (found.double() - exact).norm() < 0.02 * exact.norm()


def test_strided_rows_and_a_row_of_zeros(device):
    x, w8, scale, bias, d = (tensor.to(device) for tensor in tensors((5, 48, 32)))
    x[3] = 0
    expected = kernels(x, w8, scale, bias, d)
    assert torch.equal(expected[0][3], bias)
    for layout in (torch.stack([x, x], 1)[:, 0], x.t().contiguous().t()):
        assert not layout.is_contiguous()
        assert torch.equal(kernels(layout, w8, scale, bias, d)[0], expected[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("quantise", [quantise_rows, quantise_rows_op], ids=["kernel", "operator"])
def test_what_is_not_finite_stays_so(bad, quantise, device):
    """A run skips an update for it, so it must not become a number."""
    x, w8, scale, bias, _ = (tensor.to(device) for tensor in tensors((5, 30, 8)))
    x[2, 7] = bad
    y = int8_product_op(*quantise(x, None), w8, scale, bias, x.dtype, True)
    assert y.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_the_ops_are_what_they_declare(device):
    x, w8, scale, bias, d = (tensor.to(device) for tensor in tensors((6, 140, 9)))
    rows = quantise_rows_op(x, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(quantise_rows_op, (d, scale), test_utils=tests)
    torch.library.opcheck(int8_product_op, (*rows, w8, scale, bias, torch.float16, True), test_utils=tests)
    assert [tensor.shape for tensor in rows] == [(6, 140), (2, 6)]
    with FlopCounterMode(display=False) as counter:
        with_gradient(int8_linear, x, w8, scale, bias, d)
    assert counter.get_total_flops() == 2 * 2 * 6 * 140 * 9


def test_fake_tensors_go_through():
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(tensor) for tensor in tensors((6, 140, 9), torch.bfloat16)]
        y, dx = with_gradient(int8_linear, *given)
    assert (y.shape, y.dtype, dx.shape) == ((6, 9), torch.bfloat16, (6, 140))


def test_kernels_need_a_card(monkeypatch):
    monkeypatch.setattr("lowmem_drf.kernels.checks.INTERPRETED", False)
    with pytest.raises(ValueError, match="int8_linear_naive"):
        quantise_rows(torch.zeros(2, 4))
