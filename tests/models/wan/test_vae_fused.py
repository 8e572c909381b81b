"""The decoder with a kernel for its norms: values and gradients of diffusers' modules up to rounding, for every memory
setting."""

from functools import partial

import pytest
import torch
from _close import assert_within_budget
from _relay import LIMIT, relative_difference
from _vae import CONFIGS, fp64_throughout, library_of, oracle, some_latents, stream_gradient, vae_of

from lowmem_drf.kernels.norm_silu import norm_silu, norm_silu_naive
from lowmem_drf.method.vae_stream import ForBackward, decode, vae_backward
from lowmem_drf.models.wan.vae.decoder import WanDecoder
from lowmem_drf.models.wan.vae.fused import Wants
from lowmem_drf.models.wan.vae.segments import segments_of
from lowmem_drf.planner.ledger import Ledger

pytestmark = pytest.mark.usefixtures(fp64_throughout.__name__)
naive = partial(WanDecoder, norm_silu=norm_silu_naive)
fused = partial(WanDecoder, norm_silu=norm_silu)


@pytest.mark.parametrize("strips", [1, 2, 3])
@pytest.mark.parametrize("kept", [(0,), (1, 8, 12), tuple(range(13))], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_one_graph_of_diffusers(name, kept, strips):
    """In fp64, with the naive form in place of the kernel: the arithmetic around it."""
    library = library_of(name, 4, batch=2)
    gradient, frames, d_frames = stream_gradient(naive(vae_of(name), strips=strips), some_latents(4, batch=2), kept)
    assert relative_difference(gradient, oracle(library, kept, d_frames)) < LIMIT
    theirs = library[1].detach().clamp(-1, 1)[:, :, list(kept)].transpose(1, 2) * 0.5 + 0.5
    assert relative_difference(frames, theirs) < LIMIT


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_window_is_the_graph_with_its_caches_detached(name, window):
    gradient, _, d_frames = stream_gradient(naive(vae_of(name), strips=2), some_latents(4), (11,), window)
    assert relative_difference(gradient, oracle(library_of(name, 4, cuts=(3 - window,)), (11,), d_frames)) < LIMIT


@pytest.mark.parametrize(("name", "strips"), [("toy", 1), ("wan21", 2), ("wan22", 1)])
def test_with_the_kernel_frames_and_gradient_are_within_the_budget_of_eager(name, strips):
    """Of three upstream gradients together: of one alone, eager PyTorch's roundings may happen to cancel."""
    latents, kept = some_latents(2), (0, 4)
    runs = {}
    for label, dtype, make in (
        ("exact", torch.float64, WanDecoder),
        ("eager", torch.float32, WanDecoder),
        ("kernel", torch.float32, fused),
    ):
        decoder = make(vae_of(name, dtype), strips=strips)
        gradients = []
        for seed in (2, 3, 4):
            frames, entering = decode(decoder, latents.to(dtype), kept)
            upstream = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            gradients.append(vae_backward(decoder, latents.to(dtype), entering, upstream.to(dtype), kept))
        runs[label] = frames, torch.stack(gradients)
    for i, what in enumerate(("frames", "gradient")):
        assert_within_budget(what, runs["kernel"][i], runs["exact"][i], runs["eager"][i])


def test_the_weights_are_cast_for_the_gradient():
    """Gamma too: values in fp32, gradients in bf16 are those of a VAE cast to bf16."""
    latents, kept = some_latents(3, dtype=torch.float32), (0, 7)
    mixed = naive(vae_of("wan21", torch.float32), grad_dtype=torch.bfloat16)
    frames, left = decode(mixed, latents, kept)
    half = naive(vae_of("wan21", torch.float32).bfloat16())
    upstream = torch.randn_like(frames)
    copies = {
        chunk: tuple(c if c is None or isinstance(c, str) else half._host.put(c.get().clone()) for c in caches)
        for chunk, caches in left.caches.items()
    }
    got = vae_backward(mixed, latents, left, upstream, kept)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert torch.equal(got, vae_backward(half, latents, ForBackward(caches=copies), upstream, kept))


@pytest.mark.parametrize("name", CONFIGS)
def test_where_and_how_often_caches_wait_changes_no_bit(name):
    latents, kept = some_latents(5, dtype=torch.float32), (0, 6, 16)
    vae = vae_of(name, torch.float32)
    expected = stream_gradient(naive(vae, strips=2), latents, kept)
    for caches, every, record in (("host", 1, 0), ("card", 3, 0), ("host", 3, 0), ("card", 1, 9), ("host", 2, 1)):
        got = stream_gradient(naive(vae, strips=2, caches=caches), latents, kept, None, every, record=record)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_is_the_stream(name):
    """``decode`` under autograd, for the oracle of the step."""
    latents, factor = some_latents(3).requires_grad_(), vae_of(name).config.scale_factor_spatial
    upstream = torch.randn(1, 9, 3, 3 * factor, 2 * factor, dtype=torch.float64)
    expected, got = (
        torch.autograd.grad(make(vae_of(name)).decode(latents), latents, upstream)[0] for make in (WanDecoder, naive)
    )
    assert relative_difference(got, expected) < LIMIT


def test_a_block_keeps_its_input_and_one_activation():
    """And the weights of its convolutions: no copy, no normed value, no square, no quotient."""
    vae, kept = vae_of("wan21", torch.float32), []
    segment = next(s for s in segments_of(vae.decoder, None, norm_silu) if s.shape_only)
    x = torch.randn(1, segment.channels, 2, 6, 4, requires_grad=True)
    caches = tuple(torch.randn(1, segment.channels, 2, 6, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        segment(x, caches, False, None, Wants.GRAPH)
    weights = {weight.untyped_storage().data_ptr() for weight in segment.module.parameters()}
    activations = {
        t.untyped_storage().data_ptr(): t.nbytes for t in kept if t.untyped_storage().data_ptr() not in weights
    }
    assert activations.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert list(activations.values()) == [x.nbytes]


def test_the_pull_back_takes_fewer_operations():
    """A block's last convolution is not recomputed: five of six are left. An upsampler's output is recomputed once
    more, as it is not kept."""
    latents, flops = some_latents(3, dtype=torch.float32), {}
    for make in (WanDecoder, naive):
        decoder = make(vae_of("wan21", torch.float32))
        frames, entering = decode(decoder, latents, (8,))
        with Ledger() as ledger:
            vae_backward(decoder, latents, entering, torch.randn_like(frames), (8,))
        flops[make] = ledger.flops
    assert 0.75 * flops[WanDecoder] < flops[naive] < 0.9 * flops[WanDecoder]


def test_what_cannot_run_is_refused():
    with pytest.raises(TypeError, match="norm_silu_naive"):
        fused(vae_of("toy")).decode(some_latents(1))
    with pytest.raises(ValueError, match="freeze"):
        fused(vae_of("toy").requires_grad_(True))
