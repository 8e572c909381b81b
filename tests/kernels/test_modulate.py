"""The two kernels of adaLN, ``modulate`` and ``gate_residual``, against their naive forms."""

import functools
import itertools

import pytest
import torch
from _close import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.kernels import gate_residual as gate_file
from lowmem_drf.kernels import modulate as norm_file
from lowmem_drf.kernels.gate_residual import gate_residual, gate_residual_naive
from lowmem_drf.kernels.modulate import norm_modulate, norm_modulate_naive

EPS = 1e-6
LONG = 1000 if torch.cuda.is_available() else 300  # the interpreter is slow
SHAPES = [(1, 1, 24), (2, 63, 24), (1, 100, 96), (3, 7, 1536), (1, 2, 5120), (1, LONG, 40), (2, 33, 130)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = {
    "norm_modulate": (functools.partial(norm_modulate, eps=EPS), functools.partial(norm_modulate_naive, eps=EPS)),
    "gate_residual": (gate_residual, gate_residual_naive),
}
NAMES = {"norm_modulate": ("x", "weight", "shift"), "gate_residual": ("x", "y", "gate")}


def inputs(op, shape, dtype, device, rows=None, seed=0):
    """Leaves of both ops in their order, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, width = shape
    x, y, d = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    first, second = (torch.randn((rows or batch, width), generator=generator).to(device) for _ in range(2))
    return ([x + 0.5, first, second] if op == "norm_modulate" else [x, y, first]), d


def run(function, tensors, d, wanted=(True, True, True)):
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
    out = function(*leaves)
    gradients = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], d))
    return out.detach(), [next(gradients) if want else None for want in wanted]


def compare(op, tensors, d, wanted=(True, True, True)):
    fused, naive = OPS[op]
    out, gradients = run(fused, tensors, d, wanted)
    eager_out, eager = run(naive, tensors, d)
    exact_out, exact = run(naive, [tensor.double() for tensor in tensors], d.double())
    assert_within_budget(op, out, exact_out, eager_out)
    for name, want, *three in zip(NAMES[op], wanted, gradients, exact, eager, strict=True):
        if want:
            assert_within_budget(f"{op}: d{name}", *three)
        else:
            assert three[0] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_outputs_and_gradients(op, shape, dtype, device):
    compare(op, *inputs(op, shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_row_serves_all_sequences(op, dtype, device):
    compare(op, *inputs(op, (3, 70, 48), dtype, device, rows=1))


@pytest.mark.parametrize("op", OPS)
def test_slices_of_longer_sequences(op, device):
    tensors, d = inputs(op, (2, 90, 48), torch.float16, device)
    table = torch.randn(2, 6, 48, device=device)  # as modulation is chunked
    sliced = [tensor[:, 11:76] if tensor.dim() == 3 else table[:, i] for i, tensor in enumerate(tensors)]
    assert not any(tensor.is_contiguous() for tensor in sliced)
    compare(op, sliced, d[:, 11:76])


@pytest.mark.parametrize("op", OPS)
def test_channels_that_do_not_lie_side_by_side(op, device):
    tensors, d = inputs(op, (2, 48, 64), torch.float32, device)
    apart = [x.transpose(1, 2) if x.dim() == 3 else x.repeat_interleave(2, 1)[:, :96:2] for x in tensors]
    compare(op, apart, d.transpose(1, 2))


@pytest.mark.parametrize("op", OPS)
def test_expanded_upstream_gradient(op, device):
    tensors, d = inputs(op, (2, 70, 40), torch.float16, device)
    compare(op, tensors, d[:1, :1].expand_as(d))
    compare(op, tensors, d[:1, :1, :1].expand_as(d))


@pytest.mark.parametrize("op", OPS)
def test_a_batch_is_its_sequences_one_by_one(op, device):
    tensors, d = inputs(op, (2, 65, 48), torch.bfloat16, device)
    together_out, together = run(OPS[op][0], tensors, d)
    for b in range(2):
        out, gradients = run(OPS[op][0], [tensor[b : b + 1] for tensor in tensors], d[b : b + 1])
        for one, both in zip([out, *gradients], [together_out, *together], strict=True):
            assert torch.equal(one[0], both[b])


@pytest.mark.parametrize(
    "wanted",
    [wanted for wanted in itertools.product((True, False), repeat=3) if 0 < sum(wanted) < 3],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_unwanted_gradients(op, wanted, device):
    compare(op, *inputs(op, (2, 70, 40), torch.float16, device), wanted)


@pytest.mark.parametrize("op", OPS)
def test_nothing_of_the_result_is_an_input(op, device):
    tensors, d = inputs(op, (1, 5, 40), torch.float32, device)
    out, gradients = run(OPS[op][0], tensors, d)
    inside = {tensor.data_ptr() for tensor in tensors}
    assert out.data_ptr() not in inside
    assert not inside & {gradient.data_ptr() for gradient in gradients}


def saved_bytes(function):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        function()
    return sum(sizes)


def test_bytes_kept_for_the_backward(device):
    (x, weight, shift), _ = inputs("norm_modulate", (2, 30, 64), torch.bfloat16, device)
    x.requires_grad_()
    assert saved_bytes(lambda: norm_modulate(x, weight, shift, EPS)) == x.nbytes + weight.nbytes + 8 * 2 * 30
    (x, y, gate), _ = inputs("gate_residual", (2, 30, 64), torch.bfloat16, device)
    assert saved_bytes(lambda: gate_residual(x.requires_grad_(), y.requires_grad_(), gate)) == gate.nbytes
    assert saved_bytes(lambda: gate_residual(x, y, gate.requires_grad_())) == y.nbytes + gate.nbytes
    with torch.no_grad():
        assert saved_bytes(lambda: norm_modulate(x, weight, shift, EPS)) == 0
        assert saved_bytes(lambda: gate_residual(x, y, gate)) == 0


def test_second_derivatives_are_refused(device):
    for op, (fused, _) in OPS.items():
        tensors, d = inputs(op, (1, 5, 40), torch.float32, device)
        leaves = [tensor.requires_grad_() for tensor in tensors]
        (dx, *_) = torch.autograd.grad(fused(*leaves), leaves, d.requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_refused_before_launch(op, device):
    (x, *others), _ = inputs(op, (2, 5, 40), torch.float16, device)
    call = OPS[op][0]
    with pytest.raises(TypeError, match=f"x is torch.float64.*{op}_naive"):
        call(x.double(), *others)
    with pytest.raises(TypeError, match="x is torch.int32"):
        call(x.int(), *others)
    with pytest.raises(TypeError, match=f"{NAMES[op][2]} is torch.float16; it must be torch.float32"):
        call(x, others[0], others[1].half())
    with pytest.raises(TypeError, match=f"{NAMES[op][1]} is torch.bfloat16"):
        call(x, others[0].bfloat16(), others[1])
    with pytest.raises(ValueError, match=f"{NAMES[op][2]} is on meta"):
        call(x, others[0], others[1].to("meta"))
    with pytest.raises(ValueError, match="holds values"):
        call(*(tensor.to("meta") for tensor in (x, *others)))
    with pytest.raises(ValueError, match=r"\(5, 40\).*\(B, L, D\)"):
        call(x[0], *others)
    for rows in (others[1][:, :39], others[1].repeat(2, 1), others[1][0]):
        with pytest.raises(ValueError, match=rf"{NAMES[op][2]} has shape .*it must be \(B, D\) or \(1, D\)"):
            call(x, others[0], rows)


def test_refused_shapes(device):
    (x, weight, shift), _ = inputs("norm_modulate", (2, 5, 40), torch.float16, device)
    with pytest.raises(ValueError, match="weight and shift have shapes .* must agree"):
        norm_modulate(x, weight, shift[:1], EPS)
    with pytest.raises(ValueError, match=r"y has shape \(2, 4, 40\)"):
        gate_residual(x, x[:, :4], weight)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op, wanted):
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in inputs(op, (2, 30, 64), torch.bfloat16, "cpu")[0]]
        d = torch.empty(2, 30, 64, dtype=torch.bfloat16)
        out, gradients = run(OPS[op][0], tensors, d, wanted)
    assert (out.shape, out.dtype) == (d.shape, d.dtype)
    for tensor, gradient, want in zip(tensors, gradients, wanted, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype) if want else gradient is None


def test_registered_as_the_dispatcher_wants_it(device):
    (x, weight, shift), d = inputs("norm_modulate", (2, 5, 40), torch.bfloat16, device)
    check = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    check(norm_file.norm_modulate_forward, (x[:, 1:], weight, shift, EPS))
    _, mean, rstd = norm_file.norm_modulate_forward(x, weight, shift, EPS)
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        check(norm_file.norm_modulate_backward, (d, x, weight, mean, rstd, *wanted))
    check(gate_file.gate_residual_forward, (x[:, 1:], d[:, 1:], weight[:1]))
    check(gate_file.gate_residual_backward, (d, x, weight[:1], True))
    check(gate_file.gate_residual_backward, (d, None, weight, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_naive_forms_are_the_lines_of_the_block(dtype):
    from diffusers.models.normalization import FP32LayerNorm

    (x, scale, shift), y = inputs("norm_modulate", (2, 9, 40), dtype, "cpu")
    norm = FP32LayerNorm(40, EPS, elementwise_affine=False)
    theirs = (norm(x.float()) * (1 + scale[:, None]) + shift[:, None]).type_as(x)
    assert torch.equal(norm_modulate_naive(x, 1 + scale, shift, EPS), theirs)
    assert torch.equal(gate_residual_naive(x, y, scale), (x.float() + y.float() * scale[:, None]).type_as(x))


def test_affine_norm_is_one_row():
    (x, *_), _ = inputs("norm_modulate", (2, 9, 40), torch.float64, "cpu")
    norm = torch.nn.LayerNorm(40, EPS, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm_modulate_naive(x, norm.weight[None], norm.bias[None], EPS), norm(x))
