"""The backward pass of attention, with every tile of every card: five products with atomics, and seven with the same
bits every time; queries in parts; what it allocates."""

import math
from functools import partial

import pytest
import torch
from _close import assert_within_budget
from test_attention import check, random_ranges, run, tensors

from lowmem_drf.kernels import attention as forward_file
from lowmem_drf.kernels import attention_backward as backward_file
from lowmem_drf.kernels import attention_common
from lowmem_drf.kernels.attention import (
    attention,
    attention_backward,
    attention_naive,
    packed_ranges,
    window_ranges,
)
from lowmem_drf.kernels.attention_backward import attention_backward_workspace
from lowmem_drf.kernels.attention_query_backward import QUERY_TILES, attention_query_backward_kernel
from lowmem_drf.kernels.tiles import tuned

JOINT, KEY = backward_file.JOINT_TILES, backward_file.KEY_TILES
KEY_KERNEL = backward_file.attention_key_backward_kernel
WAYS = {"five products": False, "seven products": True}


def exact_terms(qkv, d_out, ranges=None):
    """{name: (gradient, rounding)} in fp64. ``rounding`` is the root of the sum of squares of what a sum adds up: times
    one rounding of 16 bit, the error that independent roundings of P, dS and out leave in it."""
    q, k, v = (x.double().transpose(1, 2) for x in qkv)
    heads, scale = q.shape[1] // k.shape[1], qkv[0].shape[3] ** -0.5
    k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
    s = q @ k.mT * scale
    if ranges is not None:
        key, (prefix, start, stop) = torch.arange(k.shape[2]), ranges.cpu()[..., None].unbind(2)
        s = s.masked_fill(~((key < prefix) | ((key >= start) & (key < stop)))[:, None].to(s.device), -1e300)
    p = s.softmax(-1) * (s > -1e299)
    out, d_out = p @ v, d_out.double().transpose(1, 2)
    dp, delta = d_out @ v.mT, (d_out * out).sum(-1, keepdim=True)
    ds, wrong = p * (dp - delta), p * (d_out * out).square().sum(-1, keepdim=True).sqrt()
    terms = {
        "dq": (scale * ds @ k, scale * ((ds.square() @ k.square()).sqrt() + (wrong @ k).abs())),
        "dk": (scale * ds.mT @ q, scale * ((ds.square() + wrong.square()).mT @ q.square()).sqrt()),
        "dv": (p.mT @ d_out, (p.square().mT @ d_out.square()).sqrt()),
    }
    folded = {}
    for name, (value, rounding) in terms.items():
        if name != "dq":  # of the query heads that share a key head
            value = value.unflatten(1, (-1, heads)).sum(2)
            rounding = rounding.square().unflatten(1, (-1, heads)).sum(2).sqrt()
        folded[name] = value.transpose(1, 2), rounding.transpose(1, 2)
    return folded


def check_gradients(qkv, d_out, ranges=None, deterministic=False):
    """Six standard deviations of a rounding (its largest error over the root of three), and the result's own."""
    got = run(attention, qkv, d_out, ranges=ranges, deterministic=deterministic)[1:]
    half = torch.finfo(qkv[0].dtype).eps / 2
    for (name, (value, rounding)), gradient in zip(exact_terms(qkv, d_out, ranges).items(), got, strict=True):
        allowed = half * (6 / math.sqrt(3) * rounding + value.abs()) + 1e-5 * value.abs().max()
        share = ((gradient.double() - value).abs() / allowed).max()
        assert share <= 1, f"{name}: {share:.2f} of what is allowed"


def named(tiles):
    return [
        pytest.param(tile, id=f"{'x'.join(map(str, tile.sizes.values()))}, {tile.warps} warps, {tile.stages} stages")
        for tile in tiles
    ]


CASES = {
    "ragged": ((1, 150, 200, 2, 2, 64), None),
    "cross, 80 channels, grouped": ((1, 260, 45, 2, 1, 80), None),
    "questions, grouped": ((1, 170, 170, 2, 1, 32), lambda: packed_ranges(70, [17, 40, 20], 170, "cpu")),
    "windows": ((2, 140, 140, 1, 1, 16), lambda: window_ranges([0, 64, 70, 140], "cpu")),
}


def check_case(case, device, monkeypatch, deterministic, **kernels):
    for name, (file, kernel, tile) in kernels.items():
        monkeypatch.setattr(file, name, tuned((tile,), key=["D"])(kernel))
    shape, ranges = CASES[case]
    ranges = ranges().to(device) if ranges else None
    check_gradients(*tensors(shape, torch.float16, device), ranges, deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", named(JOINT))
def test_five_products_with_every_tile(tile, case, device, monkeypatch):
    check_case(case, device, monkeypatch, False, _tuned_joint=(backward_file, KEY_KERNEL, tile))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", named(KEY))
def test_gradients_of_keys_with_every_tile(tile, case, device, monkeypatch):
    check_case(case, device, monkeypatch, True, _tuned_key=(backward_file, KEY_KERNEL, tile))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", named(QUERY_TILES))
def test_gradients_of_queries_with_every_tile(tile, case, device, monkeypatch):
    kernel = backward_file, attention_query_backward_kernel, tile
    check_case(case, device, monkeypatch, True, tuned_query=kernel)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tile", named(forward_file.TILES))
def test_outputs_with_every_tile(tile, case, device, monkeypatch):
    """By the gradients, which the forward's log-sum-exp and output decide."""
    check_case(
        case, device, monkeypatch, False, _tuned_forward=(forward_file, forward_file.attention_forward_kernel, tile)
    )


@pytest.mark.parametrize("ranges", [False, True], ids=["all keys", "ranges"])
def test_the_same_bits_every_time_are_the_naive_form(ranges, device, monkeypatch):
    """``torch.use_deterministic_algorithms`` is taken, and then no kernel with atomics is launched."""
    monkeypatch.delattr(backward_file, "_tuned_joint_fp32")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    shape = (1, 60, 70, 2, 1, 16)
    check(*tensors(shape, torch.float32, device), ranges=random_ranges(1, 60, 70).to(device) if ranges else None)


@pytest.mark.parametrize("deterministic", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("ranges", [False, True], ids=["all keys", "ranges"])
def test_queries_in_parts(ranges, deterministic, device, monkeypatch):
    """Cross-attention has few blocks of keys: the last part has fewer queries, and with ranges some parts have none."""
    monkeypatch.setattr(attention_common, "LEAST_QUERIES", 32)
    shape = (1, 150, 20, 2, 1, 16)
    assert attention_common.query_parts(150, 20, 2, 1) == 4
    ranges = window_ranges([0, 20], "cpu").expand(1, 20, 3).repeat(1, 8, 1)[:, :150].to(device) if ranges else None
    if ranges is not None:
        ranges[:, 40:] = 0
    check(*tensors(shape, torch.float32, device), partial(attention, deterministic=deterministic), ranges=ranges)


@pytest.mark.parametrize("ranges", [False, True], ids=["all keys", "ranges"])
def test_keys_with_large_scores_have_no_twin_in_dq(ranges, device):
    """The last block of keys is not full; what stands for the rest scores far above or below the keys.

    dQ = scale sum P (dP - delta) K: P comes from a score and a log-sum-exp that are each rounded in the forward and
    again in the backward. A score sums 16 products of one sign and is scaled, so it is off by at most 18 roundings of
    itself, and so is P in proportion; softmax's own backward, which has P at hand, is exact there."""
    (q, k, v), d_out = tensors((1, 40, 33, 1, 1, 16), torch.float32, device)
    window = window_ranges([0, 33], "cpu").repeat(1, 2, 1)[:, :40].to(device) if ranges else None
    for shift in (30.0, -30.0):
        qkv = [q.abs(), k.abs() + shift, v]
        got, eager = (run(one, qkv, d_out, ranges=window) for one in (attention, attention_naive))
        exact = run(attention_naive, qkv, d_out, dtype=torch.float64, ranges=window)
        for place, name in ((0, "out"), (2, "dk"), (3, "dv")):
            assert_within_budget(name, got[place], exact[place], eager[place])
        Q, K, V, D = (x[0, :, 0].double() for x in (*qkv, d_out))
        scores = Q @ K.T / 4
        dP = D @ V.T
        size = scores.softmax(-1) * (dP - (exact[0][0, :, 0] * D).sum(-1, keepdim=True)).abs() @ K.abs() / 4
        off, bound = (got[1].double() - exact[1])[0, :, 0].abs(), 2 * 18 * 2.0**-24 * scores.abs().max() * size
        assert bool((off <= bound).all())
        assert bound.max() < exact[1].abs().max()  # a twin would be at least as large as what is sought


class NotLaunched:
    def __getitem__(self, grid):
        return lambda *_, **__: None


@pytest.mark.parametrize("deterministic", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("heads", [1, 3], ids=["own keys", "grouped"])
def test_what_is_allocated_is_what_is_said(heads, deterministic, device, monkeypatch):
    qkv, d_out = tensors((1, 70, 40, 3, 3 // heads, 16), torch.float16, device)
    saved = (d_out, *qkv, torch.zeros_like(d_out), torch.zeros(1, 3, 70, device=device))
    made = []
    for name in ("_tuned_delta", "_tuned_joint", "_tuned_key", "tuned_query"):  # the interpreter allocates too
        monkeypatch.setattr(backward_file, name, NotLaunched())
    for name in ("new_empty", "new_zeros"):
        make = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    gradients = attention_backward(*saved, deterministic=deterministic)
    sums = 0 if heads == 1 else 4 * qkv[1].numel()
    allocated = sum(x.nbytes for x in made) - sum(x.nbytes for x in gradients) + sums
    assert attention_backward_workspace(*saved, 0.25, None, True, True, deterministic) == allocated
