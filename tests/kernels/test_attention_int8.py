"""8-bit attention against its naive form, which quantises in the same way, and against exact attention within the bound
of 8-bit rounding."""

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lowmem_drf.kernels.attention import attention_naive
from lowmem_drf.kernels.attention_int8 import KEYS, QUERIES, attention_int8, attention_int8_naive

SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 64),
    "one query": (1, 1, 63, 2, 2, 64),
    "grouped, two clips": (2, 63, 100, 4, 2, 64),
    "blocks end evenly": (1, 256, 128, 1, 1, 64),
    "1000 queries": (1, 1000, 70, 1, 1, 64),
    "1000 keys": (1, 65, 1000, 1, 1, 128),
    "128 channels": (1, 130, 129, 2, 1, 128),
}
DTYPES = (torch.float16, torch.bfloat16)


def tensors(shape, dtype, device, seed=0):
    """q, k, v; the keys of each channel have another mean, far from zero."""
    B, L, M, H, G, d = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(size, generator=generator) for size in ((B, L, H, d), (B, M, G, d), (B, M, G, d)))
    return [x.to(device, dtype) for x in (q, k + 4 * torch.randn(G, d, generator=generator), v)]


def check(qkv, **options):
    got = attention_int8(*qkv, **options)
    exact = attention_int8_naive(*(x.double() for x in qkv), **options)
    assert_within_budget("out", got, exact, attention_int8_naive(*qkv, **options))
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_naive_form(shape, dtype, device):
    check(tensors(shape, dtype, device))


def test_the_scale_is_taken(device):
    check(tensors((1, 40, 50, 1, 1, 64), torch.float16, device), scale=0.4)


@pytest.mark.parametrize("shape", [(2, 200, 150, 4, 2, 64), (1, 130, 300, 1, 1, 128)], ids=str)
def test_the_error_is_that_of_rounding(shape, device):
    """Half a step of error in every element moves a score by at most e, and its weight by a factor between exp(-2e) and
    exp(2e)."""
    q, k, v = tensors(shape, torch.float16, device)
    d, group = shape[-1], shape[3] // shape[4]
    exact = attention_naive(q.double(), k.double(), v.double())
    centred = k.double() - k.double().mean(1, keepdim=True)
    centred = centred.repeat_interleave(group, 2)
    half_q, half_k = (half_steps(x, rows.value) for x, rows in ((q.double(), QUERIES), (centred, KEYS)))
    q_1, k_1 = q.double().abs().sum(-1), centred.abs().sum(-1)  # (B, L, H), (B, M, H)
    off = (
        torch.einsum("blh,bmh->bhlm", q_1, half_k)
        + torch.einsum("blh,bmh->bhlm", half_q, k_1)
        + d * torch.einsum("blh,bmh->bhlm", half_q, half_k)
    )
    e = (off * d**-0.5).amax(-1).transpose(1, 2)[..., None]  # (B, L, H, 1)
    reach = attention_naive(q.double(), k.double(), v.double().abs())
    rounding = 2 * torch.finfo(torch.float16).eps * (reach + exact.abs())  # of p for the product, and of the result
    error = (attention_int8(q, k, v).double() - exact).abs()
    assert bool((error <= torch.expm1(2 * e) * reach + rounding).all())
    assert float(e.max()) < 0.5, "a larger bound would allow anything"


def half_steps(x, rows):
    """(B, L, H): half the value of one unit of the 8-bit number."""
    steps = [part.abs().amax((1, 3), keepdim=True).expand_as(part)[..., 0] / 127 for part in x.split(rows, 1)]
    return torch.cat(steps, 1) / 2


def test_the_mean_of_the_keys_does_not_matter(device):
    """If it did, keys far from zero would use up all of the 8 bits."""
    q, k, v = tensors((1, 64, 128, 1, 1, 64), torch.bfloat16, device)
    k = k.sign() * (k.abs() < 4)  # whole numbers: moved by 64 they are still exact in bf16
    moved = attention_int8(q, k + 64, v)
    exact = attention_int8_naive(q.double(), k.double(), v.double())
    assert_within_budget("out", moved, exact, attention_int8_naive(q, k, v))


@pytest.mark.parametrize("layout", ["one tensor", "heads before tokens", "channels apart"])
def test_layouts(layout, device):
    q, k, v = tensors((2, 70, 70, 2, 2, 64), torch.float16, device)
    expected = attention_int8(q, k, v)
    if layout == "one tensor":
        q, k, v = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before tokens":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    assert not q.is_contiguous()
    assert torch.equal(check([q, k, v]), expected)


def test_there_is_no_gradient(device):
    q, k, v = tensors((1, 8, 9, 1, 1, 64), torch.float16, device)
    with pytest.raises(ValueError, match="no gradient"):
        attention_int8(q, k, v.requires_grad_())
    with torch.no_grad():
        assert not attention_int8(q, k, v).requires_grad


def test_products_are_counted_as_those_of_16_bits(device):
    with FlopCounterMode(display=False) as counter:
        attention_int8(*tensors((2, 30, 40, 4, 2, 64), torch.float16, device))
    assert counter.get_total_flops() == 4 * 2 * 4 * 30 * 40 * 64


def test_fake_tensors_go_through():
    with FakeTensorMode():
        q, k = torch.empty(2, 50, 4, 64, dtype=torch.bfloat16), torch.empty(2, 60, 2, 64, dtype=torch.bfloat16)
        out = attention_int8(q, k, k.clone())
        assert out.shape == q.shape and out.dtype is torch.bfloat16


def test_the_op_is_what_it_declares(device):
    qkv = tensors((1, 20, 30, 2, 1, 64), torch.float16, device)
    torch.library.opcheck(
        torch.ops.lowmem_drf.attention_int8.default, (*qkv, 0.125), test_utils=("test_schema", "test_faketensor")
    )


def zeros(*shape, dtype=torch.float16, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


FITTING = {"q": zeros(1, 8, 2, 64), "k": zeros(1, 9, 2, 64), "v": zeros(1, 9, 2, 64)}
MISFITS = {
    "fp32": (TypeError, "attention_int8_naive", {name: x.float() for name, x in FITTING.items()}),
    "fp64": (TypeError, "attention_int8_naive", {name: x.double() for name, x in FITTING.items()}),
    "two dtypes": (TypeError, "one dtype", {"k": FITTING["k"].bfloat16()}),
    "meta": (ValueError, "one CUDA card", {name: x.to("meta") for name, x in FITTING.items()}),
    "two devices": (ValueError, "one CUDA card", {"v": FITTING["v"].to("meta")}),
    "three dimensions": (ValueError, "must be", {"q": zeros(8, 2, 64)}),
    "v unlike k": (ValueError, "must be", {"v": zeros(1, 8, 2, 64)}),
    "no queries": (ValueError, "empty", {"q": zeros(1, 0, 2, 64)}),
    "heads": (ValueError, "multiple", {"q": zeros(1, 8, 3, 64)}),
    "channels": (ValueError, "head dimension", {name: zeros(1, 8, 2, 80) for name in FITTING}),
    "scale": (ValueError, "positive", {"scale": -1.0}),
}


@pytest.mark.parametrize(("error", "says", "changed"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused(error, says, changed):
    with pytest.raises(error, match=says):
        attention_int8(**FITTING | changed)


def test_nothing_but_zeros(device):
    out = attention_int8(*(x.to(device) for x in FITTING.values()))
    assert torch.equal(out, torch.zeros_like(out))
