"""The VAE stream: frames are bitwise diffusers', gradients those of one graph of diffusers' decoder, for every memory
setting."""

import pytest
import torch
from _relay import LIMIT, relative_difference
from _streams import late_store
from _toys import whole_chunk_backward
from _vae import CONFIGS, fp64_throughout, library_of, oracle, some_latents, stream_gradient, vae_of

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.frames import kept_frames
from lowmem_drf.method.vae_stream import ForBackward, decode, vae_backward
from lowmem_drf.models.wan.vae.decoder import WanDecoder
from lowmem_drf.planner.ledger import Ledger

pytestmark = pytest.mark.usefixtures(fp64_throughout.__name__)
KEPT = {"first": (0,), "last": (16,), "even": (0, 5, 10, 16), "gap": (3, 14), "all": tuple(range(17))}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_that_of_one_graph_of_diffusers(name, kept):
    library = library_of(name, 5, batch=2)
    gradient, frames, d_frames = stream_gradient(WanDecoder(vae_of(name)), some_latents(5, batch=2), kept)
    assert relative_difference(gradient, oracle(library, kept, d_frames)) < LIMIT
    theirs = library[1].detach().clamp(-1, 1)[:, :, list(kept)].transpose(1, 2) * 0.5 + 0.5
    assert relative_difference(frames, theirs) < LIMIT


@pytest.mark.parametrize("window", [0, 1, 2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_window_is_the_graph_with_its_caches_detached(name, window):
    gradient, _, d_frames = stream_gradient(WanDecoder(vae_of(name)), some_latents(5), (15,), window)
    assert relative_difference(gradient, oracle(library_of(name, 5, cuts=(4 - window,)), (15,), d_frames)) < LIMIT


@pytest.mark.parametrize("window", [None, 0, 1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_pull_back_in_segments_is_that_of_the_whole_chunk(name, window):
    class Whole(WanDecoder):
        def store(self, caches):
            return caches

        def advance(self, latents_BC1hw, caches, keep):
            return (), tuple(caches)

        def chunk_backward(self, *args):
            return whole_chunk_backward(self, *args)

    vae, latents = vae_of(name), some_latents(6)
    expected = stream_gradient(Whole(vae), latents, (2, 9, 20), window)[0]
    assert (
        relative_difference(stream_gradient(WanDecoder(vae, strips=2), latents, (2, 9, 20), window)[0], expected)
        < LIMIT
    )


@pytest.mark.parametrize("strips", [2, 3, 4])
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_strips_change_nothing(name, rows, strips):
    """5 and 3 rows of latents: segments have 5, 10, 20, 40 and 3, 6, 12, 24 rows, which 3 and 4 rarely divide."""
    decoder = WanDecoder(vae_of(name), strips=strips)
    gradient, _, d_frames = stream_gradient(decoder, some_latents(4, rows), (1, 8, 12))
    assert relative_difference(gradient, oracle(library_of(name, 4, rows), (1, 8, 12), d_frames)) < LIMIT


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_caches_computed_again_give_the_same_bits(name, window):
    decoder, latents = WanDecoder(vae_of(name, torch.float32)), some_latents(6, dtype=torch.float32)
    kept = (0, 4, 11, 19)
    expected = stream_gradient(decoder, latents, kept, window)
    for every, record in ((3, 0), (9, 0), (1, 9), (2, 2)):
        again = stream_gradient(decoder, latents, kept, window, every, record=record)
        assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_caches_on_the_host_give_the_same_bits(name, dtype):
    vae, latents = vae_of(name, dtype), some_latents(4, dtype=dtype)
    plain, waiting = (WanDecoder(vae, strips=2, caches=caches) for caches in ("card", "host"))
    expected = stream_gradient(plain, latents, (0, 6, 12))
    for every, record in ((1, 0), (2, 0), (1, 4)):
        got = stream_gradient(waiting, latents, (0, 6, 12), None, every, record=record)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    with torch.no_grad():
        library = vae.decode(plain._to_vae(latents)).sample
        assert torch.equal(waiting.decode(latents), plain.decode(latents))
        assert torch.equal(waiting.decode(latents), (library * 0.5 + 0.5).transpose(1, 2))
        made = {}
        for decoder in (plain, waiting):
            caches, made[decoder] = decoder.start(1), []
            for z in latents.split(1, dim=2):
                frames, caches = decoder.chunk(z, caches)
                made[decoder].append(frames)
        assert not any(isinstance(cache, torch.Tensor) for cache in caches)
        assert all(torch.equal(a, b) for a, b in zip(made[plain], made[waiting], strict=True))


def test_however_late_copies_are_the_bits_are_the_same(monkeypatch):
    """Host memory of caches that a chunk has replaced is used again at once; stored caches have left the card."""
    vae, latents, kept = vae_of("toy", torch.float32), some_latents(4, 3, 2, dtype=torch.float32), (0, 6, 12)
    expected = stream_gradient(WanDecoder(vae, grad_dtype=torch.bfloat16), latents, kept, None, 2)
    store = late_store(monkeypatch, in_flight=1000)
    decoder = WanDecoder(vae, grad_dtype=torch.bfloat16, caches="host", store=store)
    got = stream_gradient(decoder, latents, kept, None, 2)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    recorded = [
        stream_gradient(WanDecoder(vae, grad_dtype=torch.bfloat16, store=one), latents, kept, record=4)[0]
        for one in (late_store(monkeypatch, in_flight=1000), None)
    ]
    assert torch.equal(*recorded)
    decoder.store((torch.zeros(1, 4, 2, 3, 2), None))
    assert not store._copier._leaving


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_is_the_same_where_caches_wait_on_the_host(name):
    vae, latents = vae_of(name), some_latents(3).requires_grad_()
    upstream = torch.randn(
        1, 9, 3, 3 * vae.config.scale_factor_spatial, 2 * vae.config.scale_factor_spatial, dtype=torch.float64
    )
    gradients = [
        torch.autograd.grad(WanDecoder(vae, caches=caches).decode(latents), latents, upstream)[0]
        for caches in ("card", "host")
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_dtype_is_that_of_a_vae_cast_to_it(name):
    """Values in fp32, gradients in bf16: caches are rounded once, and the recompute is that of the VAE in bf16."""
    latents, kept = some_latents(4, dtype=torch.float32), (0, 7, 12)
    mixed = WanDecoder(vae_of(name, torch.float32), grad_dtype=torch.bfloat16)
    frames, left = decode(mixed, latents, kept)
    assert frames.dtype == torch.float32
    assert torch.equal(frames, decode(WanDecoder(mixed.vae), latents, kept)[0])
    half = WanDecoder(vae_of(name, torch.float32).bfloat16())
    rounded = {
        chunk: half.store(tuple(c.get().clone() if hasattr(c, "get") else c for c in caches))
        for chunk, caches in left.caches.items()
    }
    assert {c.get().dtype for caches in rounded.values() for c in caches if hasattr(c, "get")} == {torch.bfloat16}
    d_frames = torch.randn_like(frames)
    got = vae_backward(mixed, latents, left, d_frames, kept)
    assert got.dtype == torch.float32
    assert torch.equal(got, vae_backward(half, latents, ForBackward(caches=rounded), d_frames, kept))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_decode_in_fp64_recorded_is_rounded_once(name):
    """The backward in fp32 reads the decode's own values, and is nearer to the exact gradient than all in fp32 is."""
    latents, kept = some_latents(4), (0, 7, 12)
    decoder = WanDecoder(vae_of(name), grad_dtype=torch.float32)
    gradient, _, d_frames = stream_gradient(decoder, latents, kept, record=4)
    exact = oracle(library_of(name, 4), kept, d_frames)
    in_fp32 = stream_gradient(WanDecoder(vae_of(name, torch.float32)), latents.float(), kept)[0].double()
    assert relative_difference(gradient, exact) < relative_difference(in_fp32, exact)


def test_inside_the_range_the_gradient_is_diffusers_own():
    vae = vae_of("wan21")
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.2)
    latents = some_latents(4).requires_grad_()
    decoder = WanDecoder(vae)
    library = vae.decode(decoder._to_vae(latents)).sample
    assert library.abs().max() < 1
    upstream = torch.randn(library.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad(library, latents, upstream)
    (got,) = torch.autograd.grad(decoder.decode(latents), latents, 2 * upstream.transpose(1, 2))
    assert relative_difference(got, expected) < LIMIT


@pytest.mark.slow
def test_exact_costs_no_more_than_a_window_of_two_chunks_allows():
    """With 8 evenly spaced frames of 81 a window of two also visits every chunk, so exact only adds cache gradients."""
    kept, latents = kept_frames(81, 8), some_latents(21, 1, 1, dtype=torch.float32)
    decoder = WanDecoder(vae_of("toy", torch.float32))
    flops = {}
    for window in (None, 2):
        frames, entering = decode(decoder, latents, kept, window)
        with Ledger() as ledger:
            vae_backward(decoder, latents, entering, torch.randn_like(frames), kept, window)
        flops[window] = ledger.flops
    assert 0 < flops[2] <= flops[None] <= 1.6 * flops[2]


@pytest.mark.parametrize("strips", [0, -1])
def test_no_strips_are_refused(strips):
    with pytest.raises(BadInputError, match="memory.vae_strips"):
        WanDecoder(vae_of("toy"), strips=strips)
