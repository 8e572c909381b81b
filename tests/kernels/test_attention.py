"""Attention against its naive form, with and without ranges: outputs, log-sum-exp and gradients; kept bytes, skipped
blocks, refused inputs."""

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lowmem_drf.kernels import attention_backward as backward_file
from lowmem_drf.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    attention_naive,
    causal_ranges,
    packed_ranges,
    window_ranges,
)
from lowmem_drf.kernels.attention_int8 import attention_int8
from lowmem_drf.kernels.checks import aligned
from lowmem_drf.kernels.tiles import Tuned

LONG = 1000 if torch.cuda.is_available() else 300
"""Several blocks, the last one not full. The interpreter takes 0.1 s for a block."""
SHAPES = {
    "one query": (1, 1, 63, 2, 2, 16),
    "grouped, two clips": (2, 63, 100, 4, 2, 32),
    "blocks end evenly": (1, 128, 128, 1, 1, 64),
    "many queries": (1, LONG, 77, 1, 1, 16),
    "many keys": (1, 33, LONG, 1, 1, 32),
    "seven heads to a key head": (1, 50, 70, 7, 1, 128),
    "80 channels": (1, 100, 65, 1, 1, 80),
    "96 channels": (1, 40, 33, 1, 1, 96),
}
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else []))


def tensors(shape, dtype, device, seed=0):
    """[q, k, v], and an upstream gradient."""
    B, L, M, H, G, d = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_out = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((B, L, H, d), (B, M, G, d), (B, M, G, d), (B, L, H, d))
    )
    return [q, k, v], d_out


def run(function, qkv, d_out, wanted=(True, True, True), dtype=None, **options):
    """out, and the wanted gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(want) for x, want in zip(qkv, wanted, strict=True)]
    out = function(*leaves, **options)
    gradients = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], d_out.to(out.dtype)))
    return [out.detach(), *(next(gradients) if want else None for want in wanted)]


def check(qkv, d_out, fused=attention, **options):
    got, eager = run(fused, qkv, d_out, **options), run(attention_naive, qkv, d_out, **options)
    exact = run(attention_naive, qkv, d_out, dtype=torch.float64, **options)
    for name, *three in zip(("out", "dq", "dk", "dv"), got, exact, eager, strict=True):
        assert_within_budget(name, *three)
    return got


def random_ranges(B, L, M, seed=0):
    """Ranges that overlap, are empty or end beyond the keys, and queries that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    prefix, start, stop = torch.randint(0, M + 20, (3, B, L), generator=generator)
    prefix = prefix * (torch.rand(B, L, generator=generator) < 0.5)
    ranges = torch.stack([prefix, start, stop], -1)
    ranges[torch.rand(B, L, generator=generator) < 0.2] = 0
    ranges[:, L // 2 : L // 2 + 40] = 0
    return ranges.to(torch.int32)


RANGES = {
    "causal": ((1, 150, 150, 1, 1, 32), lambda device: causal_ranges(150, device)),
    "questions and padding": ((1, 170, 170, 2, 1, 64), lambda device: packed_ranges(70, [17, 40, 20], 170, device)),
    "windows": ((1, 200, 200, 1, 1, 80), lambda device: window_ranges([0, 64, 128, 131, 200], device)),
    "anything, each clip its own": ((2, 90, 150, 2, 1, 16), lambda device: random_ranges(2, 90, 150).to(device)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_the_naive_form(shape, dtype, device):
    check(*tensors(shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "ranges"), RANGES.values(), ids=RANGES.keys())
def test_ranges_are_the_naive_form(shape, ranges, dtype, device):
    check(*tensors(shape, dtype, device), ranges=ranges(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_scale_is_taken(dtype, device):
    check(*tensors((1, 40, 50, 1, 1, 16), dtype, device), scale=0.7)


@pytest.mark.parametrize("ranges", [None, packed_ranges(20, [9, 11], 40, "cpu")], ids=["all keys", "ranges"])
def test_the_naive_form_is_pytorchs(ranges, device):
    (q, k, v), _ = tensors((2, 40, 40, 4, 2, 16), torch.float64, device)
    mask = None
    if ranges is not None:
        key, rows = torch.arange(40), ranges[0, :, None]
        mask = ((key < rows[..., 0]) | ((key >= rows[..., 1]) & (key < rows[..., 2]))).to(device)
        ranges = ranges.to(device)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(attention_naive(q, k, v, ranges=ranges), theirs, rtol=1e-12, atol=1e-12)


def test_the_log_sum_exp_is_natural(device):
    (q, k, v), _ = tensors((2, 65, 90, 4, 2, 32), torch.float32, device)
    _, lse = attention_forward(q, k, v, 0.3)
    assert lse.shape == (2, 4, 65)

    def naive(dtype):
        q_BHLd, k_BHMd = q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2).repeat_interleave(2, 1)
        return (q_BHLd @ k_BHMd.mT * 0.3).logsumexp(-1)

    assert_within_budget("lse", lse, naive(torch.float64), naive(torch.float32))


def test_a_query_that_sees_nothing(device):
    qkv, d_out = tensors((1, 100, 100, 1, 1, 16), torch.float16, device)
    ranges = packed_ranges(30, [20], 100, device)
    out, lse = attention_forward(*qkv, ranges=ranges)
    assert bool((out[:, 50:] == 0).all()) and bool((lse[..., 50:] == -torch.inf).all())
    assert bool(lse[..., :50].isfinite().all())
    _, dq, dk, dv = run(attention, qkv, d_out, ranges=ranges)
    assert all(bool((gradient[:, 50:] == 0).all()) and bool(gradient.isfinite().all()) for gradient in (dq, dk, dv))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_blocks_that_nobody_sees_are_not_read(device):
    """A mask alone would not pass: 0 times NaN is NaN."""
    qkv, d_out = tensors((1, 192, 192, 1, 1, 16), torch.float32, device)
    ranges = window_ranges([0, 64, 128, 192], device)
    expected = run(attention, qkv, d_out, ranges=ranges)
    for x in (*qkv, d_out):
        x[:, 64:128] = torch.nan
    for got, want in zip(run(attention, qkv, d_out, ranges=ranges), expected, strict=True):
        assert bool(got[:, 64:128].isnan().all())
        assert torch.equal(got[:, :64], want[:, :64]) and torch.equal(got[:, 128:], want[:, 128:])


@pytest.mark.parametrize("seed", range(3))
def test_the_spans_hold_every_query_that_sees_a_key(seed):
    ranges = random_ranges(2, 300, 200, seed)
    spans = backward_file._query_spans(ranges, 200)
    key, rows = torch.arange(200), ranges[:, :, None]
    seen = (key < rows[..., 0]) | ((key >= rows[..., 1]) & (key < rows[..., 2]))
    assert spans.shape == (2, 4, 2)
    for b in range(2):
        for group in range(4):
            queries = seen[b, :, 64 * group : 64 * group + 64].any(1).nonzero()
            first, last = spans[b, group].tolist()
            assert first <= int(queries.min()) < first + 64 and last - 64 <= int(queries.max()) < last


@pytest.mark.parametrize("layout", ["one tensor", "heads before tokens", "channels apart", "one gradient for all"])
def test_layouts(layout, device):
    (q, k, v), d_out = tensors((2, 70, 70, 2, 2, 32), torch.float32, device)
    if layout == "one tensor":
        q, k, v = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "heads before tokens":
        q, k, v, d_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, d_out))
    elif layout == "channels apart":
        q, k, v, d_out = (x.mT.contiguous().mT for x in (q, k, v, d_out))
    else:
        d_out = d_out[:1, :1, :1].expand_as(d_out)
    assert not q.is_contiguous() or not d_out.is_contiguous()
    check([q, k, v], d_out)


@pytest.mark.parametrize(
    "wanted",
    [(False, True, True), (True, False, True), (True, True, False), (True, False, False), (False, False, True)],
    ids=str,
)
def test_unwanted_gradients(wanted, device, monkeypatch):
    qkv, d_out = tensors((1, 50, 60, 2, 1, 16), torch.float32, device)
    exact, eager = (run(attention_naive, qkv, d_out, dtype=dtype) for dtype in (torch.float64, None))
    if not wanted[0]:
        monkeypatch.delattr(backward_file, "tuned_query_fp32")
    if not any(wanted[1:]):
        monkeypatch.delattr(backward_file, "_tuned_key_fp32")
    if not (wanted[0] and any(wanted[1:])):
        monkeypatch.delattr(backward_file, "_tuned_joint_fp32")
    got = run(attention, qkv, d_out, wanted)
    for name, asked, *three in zip(("dq", "dk", "dv"), wanted, got[1:], exact[1:], eager[1:], strict=True):
        assert asked or three[0] is None
        if asked:
            assert_within_budget(name, *three)


def test_what_would_be_read_element_by_element_is_copied(device):
    whole = torch.randn(2, 40, 3 * 64, device=device).half()
    heads = whole.unflatten(2, (3, 2, 32))
    for view in (*heads.unbind(2), heads[:, 3:, 0], heads[1:, :, 1], heads[..., 16:], whole[:1].expand(4, 40, 192)):
        assert aligned(view) is view
    flat = torch.randn(1 + 40 * 64 + 7, device=device).half()
    late, odd = flat[1 : 1 + 40 * 64].view(1, 40, 2, 32), flat.as_strided((1, 40, 2, 32), (2567, 64, 32, 1))
    for view in (late, odd, odd.as_strided((4, 20, 1, 32), (640, 32, 7, 1)), heads.mT):
        copy = aligned(view)
        assert copy.data_ptr() % 16 == 0 and torch.equal(copy, view)
        assert copy.stride() == torch.empty(view.shape).stride()
    short = torch.randn(2, 3, 24, device=device)[:, 1:]
    assert aligned(short) is short  # the strides of a copy would be as odd


def test_every_launch_is_on_the_card_of_its_tensors(device, monkeypatch):
    inside, seen = [], []

    class Guard:
        def __init__(self, x):
            inside.append(x.device)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            inside.pop()

    def noted(launch):
        def run(self, *args, **kwargs):
            seen.append(bool(inside))
            return launch(self, *args, **kwargs)

        return run

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(Tuned, "_launch", noted(Tuned._launch))
    qkv, d_out = tensors((1, 8, 8, 1, 1, 64), torch.float16, device)
    run(attention, qkv, d_out)
    attention_int8(*qkv)
    assert seen == [True] * 6


def test_the_pair_is_the_differentiable_form(device):
    qkv, d_out = tensors((1, 80, 90, 4, 2, 32), torch.float16, device)
    ranges = random_ranges(1, 80, 90).to(device)
    out, lse = attention_forward(*qkv, ranges=ranges)
    gradients = attention_backward(d_out, *qkv, out, lse, ranges=ranges)
    for got, want in zip((out, *gradients), run(attention, qkv, d_out, ranges=ranges), strict=True):
        assert torch.equal(got, want)
    assert [x.numel() for x in attention_backward(d_out, *qkv, out, lse, ranges=ranges, wanted_kv=False)[1:]] == [0, 0]
    assert attention_backward(d_out, *qkv, out, lse, ranges=ranges, wanted_q=False)[0].numel() == 0


def test_what_is_kept_for_the_backward_pass(device):
    kept = []
    (q, k, v), _ = tensors((2, 50, 60, 4, 2, 16), torch.float16, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attention(q.requires_grad_(), k, v, ranges=packed_ranges(30, [20], 50, device))
    queries, keys, rows, seen = 2 * 50 * 4 * 16 * 2, 2 * 60 * 2 * 16 * 2, 2 * 4 * 50 * 4, 50 * 3 * 4
    assert sum(x.nbytes for x in kept) == 2 * queries + 2 * keys + rows + seen


def test_products_are_counted_as_pytorch_counts_its_own(device):
    qkv, d_out = tensors((2, 30, 40, 4, 2, 16), torch.float16, device)
    q_shape, k_shape = (2, 4, 30, 16), (2, 2, 40, 16)
    for wanted, products in (((True, True, True), 5), ((True, False, False), 3), ((False, True, False), 4)):
        with FlopCounterMode(display=False) as counter:
            run(attention, qkv, d_out, wanted)
        counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        forward, backward = (counts[f"lowmem_drf.attention_{direction}"] for direction in ("forward", "backward"))
        assert forward == sdpa_flop_count(q_shape, k_shape, k_shape) == 4 * 2 * 4 * 30 * 40 * 16
        assert backward == products * 2 * 2 * 4 * 30 * 40 * 16
        if products == 5:
            assert backward == sdpa_backward_flop_count(q_shape, q_shape, k_shape, k_shape)


def test_fake_tensors_go_through():
    with FakeTensorMode():
        q, k = torch.empty(2, 50, 4, 16, dtype=torch.bfloat16), torch.empty(2, 60, 2, 16, dtype=torch.bfloat16)
        q, k, v = q.requires_grad_(), k.requires_grad_(), k.clone().requires_grad_()
        out, lse = attention_forward(q.detach(), k.detach(), v.detach())
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, torch.bfloat16, (2, 4, 50), torch.float32)
        gradients = torch.autograd.grad(attention(q, k, v), (q, k, v), torch.empty_like(q))
        assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, torch.bfloat16) for x in (q, k, v)]


@pytest.mark.parametrize("ranges", [None, causal_ranges(20, "cpu")], ids=["all keys", "ranges"])
def test_the_ops_are_what_they_declare(ranges, device):
    qkv, d_out = tensors((1, 20, 20, 2, 1, 16), torch.float32, device)
    ranges = None if ranges is None else ranges.to(device)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lowmem_drf.attention_forward.default, (*qkv, 0.25, ranges), test_utils=utilities)
    saved = (d_out, *qkv, *attention_forward(*qkv, 0.25, ranges))
    backward = torch.ops.lowmem_drf.attention_backward.default
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (*saved, 0.25, ranges, *wanted), test_utils=utilities)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


FITTING = {"q": zeros(1, 8, 2, 16), "k": zeros(1, 9, 2, 16), "v": zeros(1, 9, 2, 16)}
MISFITS = {
    "fp64": (TypeError, "attention_naive", {name: x.double() for name, x in FITTING.items()}),
    "two dtypes": (TypeError, "one dtype", {"k": FITTING["k"].half()}),
    "meta": (ValueError, "one CUDA card", {name: x.to("meta") for name, x in FITTING.items()}),
    "two devices": (ValueError, "one CUDA card", {"v": FITTING["v"].to("meta")}),
    "three dimensions": (ValueError, "must be", {"q": zeros(8, 2, 16)}),
    "v unlike k": (ValueError, "must be", {"v": zeros(1, 8, 2, 16)}),
    "no keys": (ValueError, "empty", {"k": zeros(1, 0, 2, 16), "v": zeros(1, 0, 2, 16)}),
    "heads": (ValueError, "multiple", {"q": zeros(1, 8, 3, 16)}),
    "channels": (ValueError, "head dimension", {name: zeros(1, 8, 2, 24) for name in FITTING}),
    "long ranges": (TypeError, "int32", {"ranges": zeros(1, 8, 3, dtype=torch.int64)}),
    "few ranges": (ValueError, "ranges", {"ranges": zeros(1, 7, 3, dtype=torch.int32)}),
    "scale": (ValueError, "positive", {"scale": 0.0}),
}


@pytest.mark.parametrize(("error", "says", "changed"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused(error, says, changed):
    for function in (attention, attention_forward):
        with pytest.raises(error, match=says):
            function(**FITTING | changed)


@pytest.mark.parametrize("name", ["d_out", "out", "lse"])
def test_what_the_backward_pass_needs_must_fit(name):
    given = {"d_out": zeros(1, 8, 2, 16), "out": zeros(1, 8, 2, 16), "lse": zeros(1, 2, 8)}
    with pytest.raises(ValueError, match=name):
        attention_backward(**FITTING, **given | {name: given[name][..., :-1]})
    with pytest.raises(ValueError, match=name):
        attention_backward(**FITTING, **given | {name: given[name].double()})


def test_ranges_of_each_kind():
    assert causal_ranges(3, "cpu").tolist() == [[[0, 0, 1], [0, 0, 2], [0, 0, 3]]]
    assert window_ranges([0, 1, 3], "cpu").tolist() == [[[0, 0, 1], [0, 1, 3], [0, 1, 3]]]
    assert window_ranges([0, 1, 3], "cpu", causal=True).tolist() == [[[0, 0, 1], [0, 1, 2], [0, 1, 3]]]
    packed = packed_ranges(2, [2, 1], 6, "cpu")
    assert (
        packed.tolist() == [[[0, 0, 1], [0, 0, 2], [2, 2, 3], [2, 2, 4], [2, 4, 5], [0, 0, 0]]]
        and packed.dtype is torch.int32
    )
