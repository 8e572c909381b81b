"""8-bit attention against its naive form, which quantises in the same way, and against exact attention."""

import importlib.util

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.accuracy.attention_int8 import CASES, cosine, fp16_sums, inputs, measured, toy_cosines
from lowmem_drf.errors import BadInputError
from lowmem_drf.kernels import attention_int8 as int8_file
from lowmem_drf.kernels.attention import attention_naive
from lowmem_drf.kernels.attention_int8 import (
    KEYS,
    V_BITS,
    attention_int8,
    attention_int8_forward,
    attention_int8_naive,
    attention_int8_naive_forward,
    attention_int8_workspace,
    hadamard,
)
from lowmem_drf.models.attention import with_int8_forward
from lowmem_drf.ops import Attention, int8_attention, sdpa_attention, triton_attention

SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 64),
    "one query": (1, 1, 63, 2, 2, 64),
    "grouped, two clips": (2, 63, 100, 4, 2, 64),
    "blocks end evenly": (1, 256, 128, 1, 1, 64),
    "400 queries": (1, 400, 70, 1, 1, 64),
    "400 keys": (1, 65, 400, 1, 1, 128),
    "128 channels": (1, 130, 129, 2, 1, 128),
}
DTYPES = (torch.float16, torch.bfloat16)
WITH_FP32_SUMS = next(i for i, tile in enumerate(int8_file.TILES) if not tile.sizes["HALF"])


def tensors(shape, dtype, device, seed=0):
    """q, k, v; the queries and keys of each channel have a mean of their own, far from zero."""
    B, L, M, H, G, d = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(size, generator=generator) for size in ((B, L, H, d), (B, M, G, d), (B, M, G, d)))
    q, k = (x + far * torch.randn(x.shape[2:], generator=generator) for x, far in ((q, 1), (k, 4)))
    return [x.to(device, dtype) for x in (q, k, v)]


def check(qkv, **options):
    """The interpreter rounds the fp16 sum of a block of keys once, and tensor cores after every 8 or 16 keys: each time
    by at most 2^-11 of the sum, and the budget has 2^-9 of the result beside twice PyTorch's error.
    ``test_sums_in_fp16_stay_within_the_budget`` rounds as they do."""
    out, lse = attention_int8_forward(*qkv, **options)
    exact, exact_lse = attention_int8_naive_forward(*(x.double() for x in qkv), **options)
    assert_within_budget("out", out, exact, attention_int8_naive(*qkv, **options))
    assert (lse - exact_lse).abs().max() < 5e-3  # an element that is rounded the other way moves a score by so much
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_naive_form(shape, dtype, device):
    check(tensors(shape, dtype, device))


def test_sums_in_fp32_are_the_naive_form_too(device, monkeypatch):
    """Data center cards take them."""
    tuner = int8_file._tuned_attention
    monkeypatch.setattr(tuner, "configs", [tuner.configs[WITH_FP32_SUMS]])
    check(tensors((1, 70, 100, 2, 1, 64), torch.float16, device))


def test_the_scale_is_taken(device):
    check(tensors((1, 40, 50, 1, 1, 64), torch.float16, device), scale=0.4)


def test_the_naive_form_is_exact_attention_but_for_rounding(device, monkeypatch):
    """Means, rotation and scales cancel; and any power of two of channels can be rotated."""
    monkeypatch.setattr(int8_file, "_rounded", lambda x: x)
    for shape in ((2, 20, 30, 4, 2, 32), (1, 7, 9, 1, 1, 128)):
        q, k, v = tensors(shape, torch.float64, device)
        torch.testing.assert_close(attention_int8_naive(q, k, v), attention_naive(q, k, v))
    assert torch.equal(hadamard(16) @ hadamard(16).T, 16 * torch.eye(16))
    with pytest.raises(ValueError, match="power of two"):
        attention_int8_naive(*(torch.zeros(1, 2, 1, 24) for _ in "qkv"))


def test_every_element_is_rounded_to_half_a_step_of_its_token():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = x.abs().amax(-1, keepdim=True) / 127
    rounded = int8_file._rounded(x)
    assert bool(((rounded - x).abs() <= step / 2 * (1 + 1e-9)).all())
    assert torch.equal((rounded / step).round().abs().amax(-1), torch.full((5,), 127.0, dtype=torch.float64))
    assert torch.equal(int8_file._rounded(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("case", list(CASES)[:4])
def test_the_error_is_below_one_percent_whatever_is_far_from_zero_or_large(case, device):
    q, k, v = (x[None, :, None].half() for x in inputs(case, 256))
    exact = attention_naive(q.double(), k.double(), v.double())
    out = attention_int8(*(x.to(device) for x in (q, k, v))).cpu().double()
    assert (out - exact).norm() < 0.01 * exact.norm()


def test_a_backward_in_16_bits_follows_it(device):
    """With its out and lse, whatever is far from zero: P would be off by a factor if lse lacked what the mean of k took
    away. Against the gradient of exact attention."""
    q, k, v = (x[None, :, None].to(device).half() for x in inputs(list(CASES)[1], 128))
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    forward, backward = with_int8_forward(triton_attention(), torch.device("cuda")).pair
    found = backward(d_out, q, k, v, *forward(q, k, v))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(attention_naive(*leaves), leaves, d_out.double())
    assert all(cosine(*pair) > 0.9995 for pair in zip(found, exact, strict=True))


def test_the_gradient_of_an_update_is_that_of_exact_attention_at_the_same_clip():
    """ToyWorld's few-step generator, without a forward of its own (``memory.record_rollout``)."""
    assert toy_cosines("toy-fast", 1, ["recorded"])["recorded"] > 0.9998


def test_what_pytorchs_backwards_need_of_it():
    """cuDNN's has a dimension more; that of fp32 on a card reads in rows of 32."""
    q = torch.empty(1, 40, 2, 64, dtype=torch.float16)
    cudnn = Attention.of_pair("cudnn", sdpa_attention().pair)
    assert with_int8_forward(cudnn, torch.device("cpu")).pair[0](q, q, q)[1].shape == (1, 2, 40, 1)
    with FakeTensorMode():
        q = torch.empty(1, 40, 2, 16, device="cuda")
        assert with_int8_forward(sdpa_attention(), None).pair[0](q, q, q)[1].shape == (1, 2, 64)


def test_rotation_and_weights_serve_channels_that_are_larger_than_others():
    found = measured(list(CASES)[5], 256)
    assert found["weights"] < 0.9 * found["rotation"] and found["mean of q"] > 1.4 * found["rotation"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_channel_is_shared_by_queries_and_keys(dtype, device):
    """With heads of q that share a head of k, and a channel that is constant but for rounding."""
    q, k, v = tensors((2, 40, 60, 4, 2, 64), dtype, device)
    q[..., 5] *= 16
    k[..., 9] = 3.1
    q_weight, k_weight = int8_file._weights(q, k, q.float().mean(1), k.float().mean(1))
    assert bool((q_weight[..., 5] < 1).all()) and bool((k_weight[..., 9] == 2.0**int8_file.MOST).all())
    assert torch.equal(q_weight, 1 / k_weight.repeat_interleave(2, 1))
    check([q, k, v])


def test_sums_in_fp16_stay_within_the_budget():
    """Rounded as often as tensor cores do; at the largest values that fit, a sum stays finite."""
    generator = torch.Generator().manual_seed(0)
    p, v = torch.rand(40, 300, generator=generator).double(), torch.randn(300, 64, generator=generator).double()
    exact = p @ v
    assert_within_budget("out", fp16_sums(p, v).half(), exact, exact.half())
    assert fp16_sums(torch.ones(1, KEYS).double(), torch.full((KEYS, 1), 2.0**13).double()).item() == 2.0**13 * KEYS
    assert torch.finfo(torch.float16).max > 1.9 * KEYS * 2.0**V_BITS


@pytest.mark.parametrize("factor", [2.0**12, 2.0**-20], ids=["large", "small"])
def test_values_of_any_size_are_weighted(factor, device):
    """Without a scale of their own, 64 keys would overflow fp16, or its smallest numbers lose their bits."""
    q, k, v = tensors((1, 40, 100, 1, 1, 64), torch.bfloat16, device)
    v = v.sign() * (1 + (v.abs() > 1))  # rounded nowhere
    assert torch.equal(attention_int8(q, k, factor * v), factor * attention_int8(q, k, v))


def test_the_mean_of_the_keys_does_not_matter(device):
    """If it did, keys far from zero would use up all of the 8 bits."""
    q, k, v = tensors((1, 64, 128, 1, 1, 64), torch.bfloat16, device)
    k = k.sign() * (k.abs() < 4)  # whole numbers: moved by 64 they are still exact in bf16
    moved = attention_int8(q, k + 64, v)
    exact = attention_int8_naive(q.double(), k.double(), v.double())
    assert_within_budget("out", moved, exact, attention_int8_naive(q, k, v))


@pytest.mark.parametrize("layout", ["one tensor", "heads before tokens", "channels apart"])
def test_layouts(layout, device):
    q, k, v = tensors((2, 20, 20, 2, 2, 64), torch.float16, device)
    expected = attention_int8(q, k, v)
    if layout == "one tensor":
        q, k, v = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before tokens":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    assert not q.is_contiguous()
    assert torch.equal(check([q, k, v]), expected)


@pytest.mark.parametrize("why", ["a CPU", "32 channels", "fp32"])
def test_where_the_kernel_cannot_run_the_same_is_done_in_pytorch(why, device):
    card = torch.device("cpu" if why == "a CPU" else "cuda")
    dtype = torch.float32 if why == "fp32" else torch.float16
    qkv = tensors((1, 20, 30, 2, 1, 32 if why == "32 channels" else 64), dtype, device)
    assert torch.equal(int8_attention(card)(*qkv), attention_int8_naive(*qkv))


def test_without_triton_there_is_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match="rollout_attention = .*cannot run: Triton is not installed"):
        int8_attention(torch.device("cpu"))


def test_there_is_no_gradient(device):
    q, k, v = tensors((1, 8, 9, 1, 1, 64), torch.float16, device)
    with pytest.raises(ValueError, match="no gradient"):
        attention_int8(q, k, v.requires_grad_())
    with torch.no_grad():
        assert not attention_int8(q, k, v).requires_grad


def test_products_are_counted_as_those_of_16_bits(device):
    with FlopCounterMode(display=False) as counter:
        attention_int8(*tensors((1, 30, 40, 2, 1, 64), torch.float16, device))
    assert counter.get_total_flops() == 4 * 2 * 30 * 40 * 64


def test_fake_tensors_go_through():
    with FakeTensorMode():
        q, k = torch.empty(2, 50, 4, 64, dtype=torch.bfloat16), torch.empty(2, 60, 2, 64, dtype=torch.bfloat16)
        out, lse = attention_int8_forward(q, k, k.clone())
        assert out.shape == q.shape and out.dtype is torch.bfloat16
        assert lse.shape == (2, 4, 50) and lse.dtype is torch.float32


def test_the_op_is_what_it_declares(device):
    qkv = tensors((1, 20, 30, 2, 1, 64), torch.float16, device)
    torch.library.opcheck(
        torch.ops.lowmem_drf.attention_int8.default, (*qkv, 0.125), test_utils=("test_schema", "test_faketensor")
    )


class NotLaunched:
    def __getitem__(self, grid):
        return lambda *_, **__: None


def test_what_is_allocated_is_what_is_said(device, monkeypatch):
    qkv = tensors((1, 70, 40, 4, 2, 64), torch.float16, device)
    made = []
    for name in ("_tuned_quantise", "_tuned_attention"):  # the interpreter allocates too
        monkeypatch.setattr(int8_file, name, NotLaunched())
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    results = attention_int8_forward(*qkv)
    assert attention_int8_workspace(*qkv, 0.125) == sum(x.nbytes for x in made) - sum(x.nbytes for x in results)


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
