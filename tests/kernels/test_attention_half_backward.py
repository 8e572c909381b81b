"""The backward of attention with sums in fp16: gradients within the rounding of 16 bit, at the ends of fp16's range
too; where it is taken; what it allocates."""

import math

import pytest
import torch
from test_attention import tensors
from test_attention_backward import NotLaunched, check_gradients, exact_terms

from bench.accuracy.attention_backward import CASES, measured
from lowmem_drf.kernels import attention_backward as backward_file
from lowmem_drf.kernels import attention_common
from lowmem_drf.kernels import attention_half_backward as half_file
from lowmem_drf.kernels.attention import attention_backward, attention_forward, window_ranges
from lowmem_drf.kernels.attention_backward import WAYS, attention_backward_workspace
from lowmem_drf.kernels.tiles import CARDS, tiles_for


@pytest.fixture(autouse=True)
def _half(monkeypatch):
    """It is taken wherever it may be."""
    monkeypatch.setattr(backward_file.tuned_ways, "configs", backward_file.tuned_ways.configs[-1:])


SHAPES = {
    "three heads, two clips": (2, 70, 40, 3, 3, 128),
    "one head": (1, 100, 70, 1, 1, 128),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients_have_the_rounding_of_16_bit(shape, device, monkeypatch):
    monkeypatch.delattr(backward_file, "_tuned_joint")
    check_gradients(*tensors(shape, torch.float16, device))


def test_queries_in_parts_and_strided_inputs(device, monkeypatch):
    monkeypatch.setattr(attention_common, "LEAST_QUERIES", 32)
    qkv, d_out = tensors((1, 100, 20, 2, 2, 128), torch.float16, device)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (*qkv, d_out)]
    check_gradients(turned[:3], turned[3])


MOST = 127 / 64
"""Just below a power of two, so that numbers are close to their bound."""


def _opposed(q, k, v, d_out):
    """All queries weigh two keys with 1/2, and the gradient is the largest one that there is."""
    for x in (q, k, v, d_out):
        x.zero_()
    q[..., 0], k[:, 2:, :, 0], d_out[..., 1], v[..., 1] = 64 * MOST, -MOST, MOST, -MOST
    v[:, 0, :, 1], k[:, 0, :, 2], k[:, 1, :, 2] = MOST, MOST, -MOST


def _one_key(q, k, v, d_out):
    """One key has all weight, and one token of v is far larger than the others."""
    k[:, 3] = 30 * q[:, 0]
    q.copy_(q[:, :1].expand_as(q))
    v[:, 5] *= 300
    d_out.zero_()[..., 1] = MOST


def _times(*factors):
    def change(*inputs):
        for x, factor in zip(inputs, factors, strict=True):
            x *= factor

    return change


EXTREMES = {
    "the largest sums": _opposed,
    "one key": _one_key,
    "zeros": _times(0, 0, 0, 0),
    "large": _times(2.0**30, 2.0**-32, 2.0**30, 2.0**30),
    "small": _times(2.0**-20, 2.0**-20, 2.0**-20, 2.0**-40),
}


@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES.keys())
def test_no_number_leaves_the_range_of_fp16(change, device):
    """The bound is that of bf16 results, which the interpreter truncates. Queries that are all the same have the same
    roundings, which add up; those of others are independent."""
    qkv, d_out = tensors((1, 70, 66, 1, 1, 128), torch.bfloat16, device)
    change(*qkv, d_out)
    saved = attention_forward(*qkv)
    found = attention_backward(d_out, *qkv, *saved)
    alike = all(bool((x == x[:, :1]).all()) for x in (qkv[0], d_out))
    for gradient, (name, (exact, rounding)) in zip(found, exact_terms(qkv, d_out).items(), strict=True):
        of_one = math.sqrt(d_out.shape[1]) if alike and name != "dq" else 1.0
        assert (gradient.double() - exact).norm() <= 2.0**-7 * (exact.norm() + of_one * rounding.norm())


def test_what_is_not_finite_shows(device):
    """The update is skipped then."""
    qkv, d_out = tensors((1, 20, 20, 1, 1, 128), torch.float16, device)
    for value in (float("nan"), float("inf")):
        d_out[0, 3, 0, 5] = value
        found = attention_backward(d_out, *qkv, *attention_forward(*qkv))
        assert not any(gradient.isfinite().all() for gradient in found)


def test_it_is_taken_on_geforce_cards_alone_and_never_where_the_same_bits_are_asked(device, monkeypatch):
    ways = {card: [tile.sizes["HALF"] for tile in tiles_for(WAYS, card)] for card in CARDS}
    assert ways == {80: [0], 86: [0, 1], 89: [0, 1], 90: [0], 120: [0, 1]}
    taken = []
    for name in ("_backward", "half_backward"):
        monkeypatch.setattr(backward_file, name, lambda *_, name=name: taken.append(name))

    def way(heads=1, channels=128, dtype=torch.float16, **options):
        qkv, d_out = tensors((1, 9, 9, heads, 1, channels), dtype, device)
        attention_backward(d_out, *qkv, d_out, torch.zeros(1, heads, 9, device=device), **options)
        return taken.pop()

    others = ({"heads": 2}, {"channels": 64}, {"dtype": torch.float32}, {"deterministic": True}, {"wanted_q": False})
    others += ({"ranges": window_ranges([0, 9], device)},)
    assert way() == "half_backward" and {way(**other) for other in others} == {"_backward"}


@pytest.mark.parametrize("keys", [70, 20], ids=["one part", "queries in parts"])
def test_what_is_allocated_is_what_is_said(keys, device, monkeypatch):
    """Its heads are taken in two halves, one after the other."""
    monkeypatch.setattr(attention_common, "LEAST_QUERIES", 32 if keys == 20 else 1024)
    qkv, d_out = tensors((1, 70, keys, 2, 2, 128), torch.float16, device)
    saved = (d_out, *qkv, torch.zeros_like(d_out), torch.zeros(1, 2, 70, device=device))
    made = []
    for name in ("_tuned_rows", "_tuned_half"):  # the interpreter allocates too
        monkeypatch.setattr(half_file, name, NotLaunched())
    for name in ("new_empty", "new_zeros"):
        make = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    gradients = attention_backward(*saved)
    allocated = sum(x.nbytes for x in made) - sum(x.nbytes for x in gradients)
    summed = 4 * qkv[1].numel() * (keys == 20)
    assert half_file.half_workspace(*qkv[:2]) == (allocated + summed) / 2
    assert attention_backward_workspace(*saved, 0.25) >= half_file.half_workspace(*qkv[:2])


@pytest.mark.parametrize("case", CASES)
def test_errors_are_not_above_those_of_sums_in_fp32(case):
    """Up to half as much again where one token decides them, and one rounding to fp16."""
    found = measured(case, 256)
    for name in ("dq", "dk", "dv"):
        assert found["fp16 sums"][name] <= 1.5 * found["bf16"][name] + 2.0**-11, name
