"""Activation policies: every setting leaves the gradients unchanged, and saves the bytes it claims."""

from __future__ import annotations

import gc

import pytest
import torch
from _blocks import PLANNED, gradients, in_integers, make
from _relay import LIMIT, relative_difference
from _tiny import tiny_condition, tiny_latents, tiny_transformer
from _true_size import HIDDEN, graded_step, wan_1_3b
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.memory.activations import Pace, in_slices
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, lora_parameters, lora_scale
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.planner.ledger import Ledger

GIB = 1024**3
PLAIN = dict(checkpoint=False)


@pytest.fixture
def fp64_throughout(monkeypatch):
    """Diffusers computes norms and modulations in fp32, even in an fp64 model."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))


@pytest.mark.parametrize("differentiable", [True, False], ids=["to-the-latents", "lora-only"])
@pytest.mark.parametrize("checkpoint", [True, "host"])
def test_what_waits_where_changes_no_bit(checkpoint, differentiable):
    transformer = make()
    wanted = gradients(transformer, PLAIN, differentiable=differentiable)
    got = gradients(transformer, dict(checkpoint=checkpoint), differentiable=differentiable)
    assert len(got) == len(wanted) > 40 and all(g.any() for g in got)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("differentiable", [True, False], ids=["to-the-latents", "lora-only"])
@pytest.mark.parametrize(
    "targets",
    [DEFAULT_TARGETS, ("to_q",), ("ffn.net.2",), ("attn2.to_k", "time_proj", "text_embedder.linear_1")],
    ids=str,
)
@pytest.mark.parametrize("settings", [PLAIN, dict(), dict(checkpoint="host")], ids=str)
def test_slices_change_nothing_but_rounding(fp64_throughout, settings, targets, differentiable):
    transformer = make(targets=targets)
    wanted = gradients(transformer, PLAIN, differentiable=differentiable)
    for slices in (2, 5, 100):  # of 12 tokens
        got = gradients(transformer, dict(slices=slices, **settings), differentiable=differentiable)
        for ours, theirs in zip(got, wanted, strict=True):
            assert relative_difference(ours, theirs) < LIMIT


def test_products_of_integers_are_the_same_in_slices_and_in_a_recompute(fp64_throughout):
    """Tokens are quantised each for itself."""
    transformer = in_integers(make())
    wanted = gradients(transformer, PLAIN)
    for settings in (dict(slices=5), dict(checkpoint="host", slices=2, keep_attention="host")):
        for ours, theirs in zip(gradients(transformer, settings), wanted, strict=True):
            assert relative_difference(ours, theirs) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_over_slices_is_within_the_budget(dtype, monkeypatch):
    """Against fp64: at most twice the rounding error of the whole sequence, plus one rounding of the result."""
    whole = gradients(make(dtype), PLAIN, dtype)
    sliced = gradients(make(dtype), dict(slices=5), dtype)
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    exact_model = make(torch.float64)
    with torch.no_grad():  # the same weights, to the bit
        for exact, rounded in zip(exact_model.parameters(), make(dtype).parameters(), strict=True):
            exact.copy_(rounded)
    text = tiny_condition(2, dtype).double()
    monkeypatch.setattr("_blocks.tiny_condition", lambda *_: text)
    x = tiny_latents(2, dtype=dtype).double()
    monkeypatch.setattr("_blocks.tiny_latents", lambda *_, **__: x)
    exact = gradients(exact_model, PLAIN)
    for name, a, b, truth in zip(range(len(exact)), sliced, whole, exact, strict=True):
        budget = 2 * (b.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (a.double() - truth).norm() <= budget, name


def test_without_gradient_slices_give_the_same_clip(fp64_throughout):
    transformer = make()
    set_activations(transformer, Activations(**PLAIN))
    velocity, x, text = as_velocity(transformer), tiny_latents(1), tiny_condition(1)
    with torch.no_grad():
        wanted = velocity(x, 0.5, text)
        set_activations(transformer, Activations(slices=5))
        assert relative_difference(velocity(x, 0.5, text), wanted) < LIMIT
        with lora_scale(transformer, 0):
            bare = velocity(x, 0.5, text)
        assert relative_difference(bare, wanted) > 0.01  # the LoRA is inside the slices
        set_activations(transformer, Activations(**PLAIN))
        assert torch.equal(velocity(x, 0.5, text), wanted)  # and they can be taken off again


def test_forwards_may_be_many_before_a_backward_and_may_be_given_up():
    """A rollout, a forward without a backward, two live graphs, backward in either order: right, and the host is empty
    after."""
    transformer = make()
    wanted = gradients(transformer, PLAIN)
    set_activations(transformer, Activations("host", store=PLANNED))
    velocity, x, text = as_velocity(transformer), tiny_latents(2).requires_grad_(), tiny_condition(2)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with Ledger() as ledger:
        with torch.no_grad():
            velocity(x, 0.9, text)
        velocity(x, 0.7, text)
        first, second = velocity(x, 0.5, text), velocity(x, 0.5, text)
        # 4 blocks of 2 graphs: 12 tokens of 2 clips, width 24
        assert ledger.host_bytes == 2 * 4 * x[0, 0].numel() // 4 * 24 * 8 * 2
        for v in (first, second):
            got = torch.autograd.grad(v, [*lora_parameters(transformer), x], upstream)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted[1:], strict=True))
        del first, second, v
        gc.collect()
        assert ledger.host_bytes == 0


def test_a_host_policy_needs_a_store():
    with pytest.raises(ValueError, match="need a store"):
        set_activations(tiny_transformer(), Activations("host"))


@pytest.fixture(scope="module")
def true_size():
    """(layers, settings) -> ``Bytes``."""
    seen = {}

    def run(layers=2, **settings):
        settings = dict(checkpoint=True, slices=1) | settings
        key = (layers, *sorted(settings.items()))
        if key not in seen:
            with FakeTensorMode() as mode:
                model = wan_1_3b(mode, layers)
                set_activations(model, Activations(store=PLANNED, **settings))
                seen[key] = graded_step(model)
        return seen[key]

    return run


def test_bytes_of_keeping_recomputing_and_waiting_at_true_size(true_size):
    keep, recompute, host = (true_size(checkpoint=value) for value in (False, True, "host"))
    assert host.kept < recompute.kept < keep.kept and host.peak < recompute.peak < keep.peak
    assert recompute.kept - host.kept == host.waiting == 2 * HIDDEN and recompute.waiting == 0
    assert keep.kept - recompute.kept > 5.5 * GIB
    assert keep.flops < recompute.flops == host.flops  # the price


@pytest.mark.slow
def test_on_the_host_the_peak_does_not_grow_with_the_blocks(true_size):
    # a block's LoRA gradients, fp32: A and B of 8 projections and of the feed-forward's two
    lora = 4 * 32 * (2 * 8 * 1536 + 2 * (1536 + 8960))
    few, many = (true_size(layers, checkpoint="host", slices=4) for layers in (2, 3))
    assert many.peak - few.peak <= lora
    assert many.waiting - few.waiting == HIDDEN
    few, many = (true_size(layers, slices=4) for layers in (2, 3))
    assert many.peak - few.peak >= HIDDEN


@pytest.mark.slow
def test_bytes_and_price_of_slices_at_true_size(true_size):
    """In diffusers a block's copies of the whole sequence take 4 GiB; in slices its backward holds little more than
    attention needs."""
    peaks = [true_size(slices=slices).peak for slices in (1, 4, 16)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 4.2 * GIB and peaks[1] < 1.9 * GIB
    # the inputs of both blocks; q, k, v, the attention's output and their gradients, two of them for a moment with
    # their fp32 sum; two gradients of the input
    assert peaks[2] < 14 * HIDDEN
    # before the attention everything is computed once more, after it nothing is
    assert true_size(slices=4).flops - true_size().flops <= 2 * 3 * 2 * 32_760 * 1536 * (1536 + 2 * 32)
    assert true_size(slices=4).flops < 1.02 * true_size().flops


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_sliced_functions_have_the_gradients_of_whole_ones(count):
    """Two results, an unused result, an input without gradient, shared inputs with and without, a parameter, a length
    that no count divides, and where a slice begins."""
    generator = torch.Generator().manual_seed(0)
    x, y, shared, fixed, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 7, 3), (2, 7, 5), (2, 1, 3), (2, 1, 3), (3, 4))
    )
    x, shared, weight = (tensor.requires_grad_() for tensor in (x, shared, weight))

    def function(start, x, y, shared, fixed):
        place = torch.arange(start, start + x.shape[1])[:, None]
        return (x * shared * place).sin() @ weight, y.cos(), (x * fixed).unsqueeze(-1) * y[..., None, :2]

    def sliced(x, shared, weight):
        a, _, c = in_slices(function, count, [x, y], [shared, fixed], [weight])
        return a, c

    for ours, theirs in zip(
        in_slices(function, count, [x, y], [shared, fixed], [weight]), function(0, x, y, shared, fixed), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * torch.finfo(torch.float64).eps)
    assert torch.autograd.gradcheck(sliced, (x, shared, weight))


def test_a_slice_at_a_time_is_alive():
    """Forward, backward and without gradient: only one slice's activations of 10 are alive."""
    wide = torch.nn.Linear(64, 6400, bias=False).requires_grad_(False)
    x, scale = torch.randn(1, 1000, 64, requires_grad=True), torch.ones(6400, requires_grad=True)

    def function(start, x):
        return ((wide(x) * scale).sin() @ wide.weight,)

    hidden = 1000 * 6400 * 4

    def peak(count, gradient):
        with Ledger() as ledger, torch.set_grad_enabled(gradient):
            (out,) = in_slices(function, count, [x], parameters=[scale])
            if gradient:
                ledger.reset_peak()
                torch.autograd.grad(out, [x, scale], torch.ones_like(out))
        return ledger.peak_card_bytes

    for gradient in (False, True):
        assert peak(1, gradient) > 2 * hidden
        assert peak(10, gradient) < peak(1, gradient) / 4


def test_the_unread_part_is_not_computed_again():
    transformer = make(layers=1)
    velocity, x, text = as_velocity(transformer), tiny_latents(1), tiny_condition(1)
    flops = {}
    for checkpoint in (False, True):
        set_activations(transformer, Activations(checkpoint, slices=2))
        out = velocity(x, 0.5, text)
        with Ledger() as ledger:
            out.backward(torch.ones_like(out))
        flops[checkpoint] = ledger.flops
    tokens, width = 12, 24
    before = 3 * 2 * tokens * width * (width + 2 * 2) + 2 * 2 * tokens**2 * width + 2 * 2 * 6 * width * (width + 2 * 2)
    assert flops[True] - flops[False] == before  # q, k, v with their LoRA, the self-attention, the text's k and v


def test_under_zero_3_the_cpu_stays_a_block_ahead_of_the_card(monkeypatch):
    log = []

    class Event:
        def __init__(self, blocking):
            assert blocking  # waiting must not keep a core busy
            self.number = len([what for what, _ in log if what == "issued"])

        def record(self):
            log.append(("issued", self.number))

        def synchronize(self):
            log.append(("waited for", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace()
    pace.keep(torch.device("cpu"))
    assert log == []
    for _ in range(3):
        pace.keep(torch.device("cuda"))
    assert log == [("issued", 0), ("issued", 1), ("waited for", 0), ("issued", 2), ("waited for", 1)]
