"""The VAE stream's memory in bytes: at true size on fake tensors, and what each saving saves on real ones."""

import pytest
import torch
from _vae import some_latents, stream_gradient, vae_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.memory.fakes import Fakes
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.ledger import Ledger
from lowmem_drf.method.frames import kept_frames
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.decoder import WanDecoder

GIB = 1024**3
WAN21 = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True])
LATENT_HEIGHT, LATENT_WIDTH = 60, 104  # 832x480 pixels


def true_size(frames, grad_dtype, strips):
    """Peak bytes of (decode, backward) of a clip of 832x480 with 8 kept frames, the weights of the whole VAE in fp32 included."""
    from diffusers import AutoencoderKLWan

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        vae = AutoencoderKLWan(**WAN21).eval()
    for module in vae.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                with mode:
                    module._parameters[name] = nn.Parameter(torch.empty(weight.shape), requires_grad=False)
    latents = mode.from_tensor(torch.empty(1, 16, (frames - 1) // 4 + 1, LATENT_HEIGHT, LATENT_WIDTH))
    kept = kept_frames(frames, 8)
    with Fakes(mode), Ledger() as ledger:
        ledger.adopt(vae.parameters())
        assert 0.47 * GIB < ledger.card_bytes < 0.48 * GIB
        decoder = WanDecoder(vae, grad_dtype=grad_dtype, strips=strips, caches="host", store=HostStore(torch.device("cpu")))
        made, entering = decode(decoder, latents, kept)
        peaks = [ledger.peak_card_bytes]
        ledger.reset_peak()
        vae_backward(decoder, latents, entering, torch.empty_like(made), kept)
        peaks.append(ledger.peak_card_bytes)
    return peaks


def test_the_vae_stage_stays_under_6_gib_whatever_the_frames():
    """Exact gradients, 832x480; the critic sees frames in fp32."""
    short, long = (true_size(frames, torch.bfloat16, strips=2) for frames in (17, 81))
    assert max(short + long) < 6 * GIB
    for few, many in zip(short, long, strict=True):
        assert many == pytest.approx(few, rel=0.05)  # the bound that the project promises


def test_gradients_in_fp32_stay_under_6_gib_too():
    assert max(true_size(13, torch.float32, strips=8)) < 6 * GIB


def peaks(frames=13, cache_every=1, **settings):
    """(card, host) peak bytes of the stream's gradient on a real VAE, its weights not counted."""
    latents = some_latents(1 + (frames - 1) // 4, 6, 4, dtype=torch.float32)
    decoder = WanDecoder(vae_of("wan21", torch.float32), **settings)
    with Ledger() as ledger:
        stream_gradient(decoder, latents, (0, 5, frames - 1), cache_every=cache_every)
    return ledger.peak_card_bytes, ledger.peak_host_bytes


def caches_bytes(chunk=2, **settings):
    """Of all the caches that enter a chunk."""
    decoder, latents = WanDecoder(vae_of("wan21", torch.float32)), some_latents(3, 6, 4, dtype=torch.float32)
    caches = decoder.start(1)
    with torch.no_grad():
        for z in latents.split(1, dim=2)[:chunk]:
            caches = decoder.chunk(z, caches)[1]
    return sum(cache.nbytes for cache in caches if isinstance(cache, torch.Tensor))


def test_each_saving_saves_bytes_on_the_card():
    plain, strips = (peaks(strips=n)[0] for n in (1, 4))
    assert strips < plain
    waiting, both = (peaks(strips=n, caches="host")[0] for n in (1, 4))
    assert waiting < plain and both < min(waiting, strips)
    # the gradients of a whole set of caches are never on the card at once: the larger half of it are those of full resolution
    assert strips - both > caches_bytes() / 2


def test_the_card_holds_no_more_for_more_frames():
    """Of a cache's bytes nothing; a chunk more costs its latents and its share of the bookkeeping, under 5%."""
    few, many = (peaks(frames, strips=2, caches="host")[0] for frames in (17, 49))
    assert many == pytest.approx(few, rel=0.05)


def test_the_host_holds_every_mth_of_the_entering_caches():
    sets = caches_bytes()
    chunks = 9
    every = {m: peaks(4 * (chunks - 1) + 1, cache_every=m)[1] for m in (1, 3)}
    # those of the first chunk are empty, of the second hold one frame and not two; all the others are alike
    assert (chunks - 2) * sets < every[1] < (chunks - 1) * sets
    # chunks 0, 3, 6 are stored, and in the backward of the last group two more are filled in
    assert 4 * sets <= every[3] < 5 * sets


@pytest.mark.parametrize("caches", ["card", "host"])
def test_nothing_stays_behind(caches):
    latents = some_latents(4, dtype=torch.float32)
    decoder = WanDecoder(vae_of("wan21", torch.float32), strips=2, caches=caches)
    with Ledger() as ledger:
        kept = stream_gradient(decoder, latents, (0, 12))
        assert ledger.host_bytes == 0
        assert ledger.card_bytes == sum(tensor.nbytes for tensor in (*kept, latents))
