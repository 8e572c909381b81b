"""RMSNorm and rotary embedding of queries and keys against their naive form, and the naive form against diffusers."""

import functools

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.kernels.rope_qk import (
    rms_norm,
    rms_norm_naive,
    rope_qk,
    rope_qk_backward,
    rope_qk_forward,
    rope_qk_naive,
)

EPS = 1e-6
SHAPES = [
    (1, 1, 2, 12),
    (2, 63, 2, 12),
    (1, 100, 3, 32),
    (3, 7, 12, 128),
    (1, 2, 40, 128),
    (1, 1000, 2, 8),
    (2, 33, 5, 26),
]
"""B, L, H, d."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("q", "k", "weight_q", "weight_k")


def inputs(shape, dtype, device, weights=torch.float32, seed=0):
    """q, k and their weights; cos and sin; two upstream gradients."""
    batch, length, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn((batch, length, heads * dim), generator=generator).to(device, dtype) for _ in range(2))
    weight_q, weight_k = (torch.randn(heads * dim, generator=generator).to(device, weights) for _ in range(2))
    angles = (6 * torch.rand((1, length, 1, dim // 2), generator=generator)).repeat_interleave(2, 3).to(device)
    upstream = [torch.randn((batch, length, heads, dim), generator=generator).to(device, dtype) for _ in range(2)]
    return [q, k, weight_q, weight_k], (angles.cos(), angles.sin()), upstream


def run(function, tensors, upstream, wanted=None):
    """Outputs of a function of ``tensors``, and their gradients."""
    wanted = wanted or [True] * len(tensors)
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    out = function(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    pairs = [(one, d) for one, d in zip(outs, upstream, strict=True) if one.requires_grad]
    used, upstream = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(used, [leaf for leaf in leaves if leaf.requires_grad], upstream))
    return [one.detach() for one in outs], [next(gradients) if want else None for want in wanted]


def compare(tensors, tables, upstream, heads, wanted=None):
    given = {"cos": tables[0], "sin": tables[1], "heads": heads, "eps": EPS}
    both = [functools.partial(function, **given) for function in (rope_qk, rope_qk_naive)]
    compare_functions(*both, NAMES, tensors, upstream, wanted)


def compare_functions(fused, naive, names, tensors, upstream, wanted=None):
    outs, gradients = run(fused, tensors, upstream, wanted)
    eager_outs, eager = run(naive, tensors, upstream)
    exact_outs, exact = run(naive, [tensor.double() for tensor in tensors], [d.double() for d in upstream])
    for i, three in enumerate(zip(outs, exact_outs, eager_outs, strict=True)):
        assert_within_budget(f"output {i}", *three)
    for name, want, *three in zip(names, wanted or [True] * len(names), gradients, exact, eager, strict=True):
        if want:
            assert_within_budget(f"d{name}", *three)
        else:
            assert three[0] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype, device):
    compare(*inputs(shape, dtype, device), heads=shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_alone(shape, dtype, device):
    (x, _, weight, _), _, (d, _) = inputs(shape, dtype, device)
    both = (functools.partial(function, eps=EPS) for function in (rms_norm, rms_norm_naive))
    compare_functions(*both, ("x", "weight"), [x, weight], [d.flatten(2)])


@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_weights_of_any_dtype(weights, device):
    tensors, tables, upstream = inputs((2, 70, 2, 16), torch.float16, device, weights)
    compare(tensors, tables, upstream, heads=2)


def test_slices_of_longer_sequences_and_tables(device):
    (q, k, *weights), (cos, sin), upstream = inputs((2, 90, 3, 16), torch.bfloat16, device)
    table = torch.cat((cos, sin), 3)
    both = torch.cat((q, k), 2)  # one projection made them
    sliced = [both[:, 11:76, :48], both[:, 11:76, 48:], *weights]
    compare(sliced, (table[:, 11:76, :, :16], table[:, 11:76, :, 16:]), [d[:, 11:76] for d in upstream], heads=3)


def test_tables_without_batch_and_heads(device):
    tensors, tables, upstream = inputs((1, 20, 2, 16), torch.float32, device)
    flat = [table[0, :, 0] for table in tables]
    for one, other in zip(rope_qk(*tensors, *tables, 2, EPS), rope_qk(*tensors, *flat, 2, EPS), strict=True):
        assert torch.equal(one, other)
    doubles = [table.double() for table in tables]
    assert torch.equal(rope_qk(*tensors, *doubles, 2, EPS)[1], rope_qk(*tensors, *tables, 2, EPS)[1])
    compare(tensors, [table.repeat_interleave(2, 1)[:, ::2] for table in flat], upstream, heads=2)


def test_upstream_as_attention_returns_it(device):
    tensors, tables, upstream = inputs((2, 65, 3, 16), torch.float16, device)
    compare(tensors, tables, [d.transpose(1, 2).contiguous().transpose(1, 2) for d in upstream], heads=3)
    compare(tensors, tables, [d[:1, :1, :1].expand_as(d) for d in upstream], heads=3)
    compare(tensors, tables, [d[:1, :1, :1, :1].expand_as(d) for d in upstream], heads=3)


def test_channels_that_do_not_lie_side_by_side(device):
    (q, k, *weights), tables, upstream = inputs((2, 48, 2, 24), torch.float32, device)
    columns = [weight.repeat_interleave(2)[::2] for weight in weights]
    apart = [d.transpose(1, 3).contiguous().transpose(1, 3) for d in upstream]
    compare([q.transpose(1, 2).contiguous().transpose(1, 2), k, *columns], tables, apart, heads=2)


def test_a_batch_is_its_sequences_one_by_one(device):
    (q, k, *weights), tables, upstream = inputs((2, 65, 2, 16), torch.bfloat16, device)
    function = functools.partial(rope_qk, cos=tables[0], sin=tables[1], heads=2, eps=EPS)
    together, gradients = run(function, [q, k, *weights], upstream)
    for b in range(2):
        outs, own = run(function, [q[b : b + 1], k[b : b + 1], *weights], [d[b : b + 1] for d in upstream])
        for one, both in zip([*outs, *own[:2]], [*together, *gradients[:2]], strict=True):
            assert torch.equal(one[0], both[b])


@pytest.mark.parametrize("alone", [False, True], ids=["off", "alone"])
@pytest.mark.parametrize("name", NAMES)
def test_unwanted_gradients(name, alone, device):
    compare(*inputs((2, 70, 2, 12), torch.float16, device), heads=2, wanted=[(one == name) == alone for one in NAMES])


def test_an_unused_result(device):
    (q, k, *weights), tables, (d, _) = inputs((1, 9, 2, 12), torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in (q, k, *weights)]
    turned_q, _ = rope_qk(*leaves, *tables, 2, EPS)
    gradients = torch.autograd.grad(turned_q, leaves, d, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, False, True, False]


def test_bytes_kept_for_the_backward(device):
    (q, k, *weights), tables, _ = inputs((2, 30, 2, 32), torch.bfloat16, device)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        rope_qk(q.requires_grad_(), k, *weights, *tables, 2, EPS)
        shared = weights[0].nbytes + tables[0].nbytes + tables[1].nbytes
        assert sum(sizes) == q.nbytes + 4 * 2 * 30 + shared
        sizes.clear()
        rms_norm(q, weights[0], EPS)
        assert sum(sizes) == q.nbytes + 4 * 2 * 30 + weights[0].nbytes
        sizes.clear()
        with torch.no_grad():
            rope_qk(q, k, *weights, *tables, 2, EPS)
        rope_qk(q.detach(), k, *weights, *tables, 2, EPS)
        assert not sizes


def test_second_derivatives_are_refused(device):
    (q, k, *weights), tables, (d, _) = inputs((1, 5, 2, 12), torch.float32, device)
    turned, _ = rope_qk(q.requires_grad_(), k, *weights, *tables, 2, EPS)
    (dq,) = torch.autograd.grad(turned, q, d.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_refused_before_launch(device):
    (q, k, weight_q, weight_k), (cos, sin), _ = inputs((2, 5, 2, 12), torch.float16, device)
    with pytest.raises(TypeError, match="q is torch.float64.*rope_qk_naive"):
        rope_qk(q.double(), k, weight_q, weight_k, cos, sin, 2, EPS)
    with pytest.raises(TypeError, match="k is torch.bfloat16"):
        rope_qk(q, k.bfloat16(), weight_q, weight_k, cos, sin, 2, EPS)
    with pytest.raises(TypeError, match="weight_k is torch.float64"):
        rope_qk(q, k, weight_q, weight_k.double(), cos, sin, 2, EPS)
    with pytest.raises(TypeError, match="sin is torch.float16; it must be float32 or float64"):
        rope_qk(q, k, weight_q, weight_k, cos, sin.half(), 2, EPS)
    with pytest.raises(TypeError, match="x is torch.float64.*rms_norm_naive"):
        rms_norm(q.double(), weight_q, EPS)
    with pytest.raises(ValueError, match="k is on meta"):
        rope_qk(q, k.to("meta"), weight_q, weight_k, cos, sin, 2, EPS)
    with pytest.raises(ValueError, match="cos is on meta"):
        rope_qk(q, k, weight_q, weight_k, cos.to("meta"), sin, 2, EPS)
    with pytest.raises(ValueError, match="holds values"):
        rms_norm(q.to("meta"), weight_q.to("meta"), EPS)
    with pytest.raises(ValueError, match=r"q has shape \(5, 24\)"):
        rope_qk(q[0], k[0], weight_q, weight_k, cos, sin, 2, EPS)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 24\); it must be \(2, 5, 24\)"):
        rope_qk(q, k[:, :4], weight_q, weight_k, cos, sin, 2, EPS)
    with pytest.raises(ValueError, match=r"weight has shape \(23,\); it must be \(24,\)"):
        rms_norm(q, weight_q[:23], EPS)
    for heads in (0, 5, 8):
        with pytest.raises(ValueError, match=f"24 channels are not {heads} heads"):
            rope_qk(q, k, weight_q, weight_k, cos, sin, heads, EPS)
    for table in (cos[:, :4], cos[..., :6], cos[0], cos.expand(2, -1, -1, -1)):
        with pytest.raises(ValueError, match=r"cos has shape .* must be \(L, d\) or \(1, L, 1, d\)"):
            rope_qk(q, k, weight_q, weight_k, table, sin, 2, EPS)
    with pytest.raises(ValueError, match="sin wants a gradient"):
        rope_qk(q, k, weight_q, weight_k, cos, sin.requires_grad_(), 2, EPS)


@pytest.mark.parametrize(
    "wanted", [(True, True, True, True), (True, True, False, False), (False, False, True, False)], ids=str
)
def test_fake_tensors(wanted):
    tensors, tables, upstream = inputs((2, 30, 2, 32), torch.bfloat16, "cpu", weights=torch.bfloat16)
    with FakeTensorMode() as mode:
        tensors, (cos, sin), upstream = (
            [mode.from_tensor(tensor) for tensor in group] for group in (tensors, tables, upstream)
        )
        outs, gradients = run(functools.partial(rope_qk, cos=cos, sin=sin, heads=2, eps=EPS), tensors, upstream, wanted)
        norm = rms_norm(tensors[0], tensors[2], EPS)
    assert [(out.shape, out.dtype) for out in outs] == [(d.shape, d.dtype) for d in upstream]
    for tensor, gradient, want in zip(tensors, gradients, wanted, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype) if want else gradient is None
    assert (norm.shape, norm.dtype) == (tensors[0].shape, torch.bfloat16)


def test_registered_as_the_dispatcher_wants_it(device):
    (q, _, weight, _), (cos, sin), (d, _) = inputs((2, 5, 2, 12), torch.bfloat16, device, weights=torch.bfloat16)
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    tables = (cos[0, :, 0], sin[0, :, 0])
    for pair in (tables, (None, None)):
        check(rope_qk_forward, (q, weight, *pair, 2, EPS))
        _, rstd = rope_qk_forward(q, weight, *pair, 2, EPS)
        for wanted in ((True, True), (True, False), (False, True)):
            check(rope_qk_backward, (d, q, weight, rstd, *pair, *wanted))


def test_naive_form_is_that_of_diffusers():
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

    torch.manual_seed(0)
    attention = WanAttention(dim=24, heads=2, dim_head=12, eps=EPS, processor=WanAttnProcessor()).double()
    torch.nn.init.normal_(attention.norm_q.weight)
    torch.nn.init.normal_(attention.norm_k.weight)
    latents = torch.randn(1, 4, 3, 4, 6)
    cos, sin = (table.double() for table in WanRotaryPosEmbed(12, (1, 2, 2), 32)(latents))
    hidden = torch.randn(1, cos.shape[1], 24, dtype=torch.float64)
    weights = (attention.norm_q.weight, attention.norm_k.weight)
    q, k = rope_qk_naive(attention.to_q(hidden), attention.to_k(hidden), *weights, cos, sin, 2, EPS)
    v = attention.to_v(hidden).unflatten(2, (2, -1))
    heads = (x.transpose(1, 2) for x in (q, k, v))
    ours = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.to_out[0](ours), attention(hidden, rotary_emb=(cos, sin)))
    torch.testing.assert_close(rms_norm_naive(hidden, weights[0], EPS), attention.norm_q(hidden))
