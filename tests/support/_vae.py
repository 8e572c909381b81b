"""What the tests of the VAE stream share: three tiny VAEs, and diffusers' own decoder as one graph, to compare with."""

from functools import cache

import pytest
import torch
from _tiny import WAN22_VAE, Z_DIM, tiny_vae

from lowmem_drf.method.frames import backward_chunks
from lowmem_drf.method.vae_stream import decode, vae_backward

# the tiny VAE; Wan 2.1's own pattern of time upsampling; Wan 2.2's, its residual blocks, pixel patches and a decoder of
# its own width
CONFIGS = {
    "toy": {},
    "wan21": dict(dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True], scale_factor_spatial=8),
    "wan22": WAN22_VAE,
}


@pytest.fixture
def fp64_throughout(monkeypatch):
    """Diffusers upsamples Wan's activations in fp32 (``x.float()``), in an fp64 model too. Sums of gradients would be
    rounded to 1e-7."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))


def some_latents(frames, height=3, width=2, batch=1, dtype=torch.float64):
    return torch.randn(
        batch, Z_DIM, frames, height, width, generator=torch.Generator().manual_seed(11), dtype=torch.float64
    ).to(dtype)


def library_graph(vae, latents_BCFhw, cuts=()):
    """Frames in [-1, 1] before the clamp, by ``AutoencoderKLWan._decode`` of diffusers; no gradient passes the caches
    that enter chunks in ``cuts``."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    z = vae.post_quant_conv(latents_BCFhw / (1.0 / std).to(latents_BCFhw) + mean.to(latents_BCFhw))
    vae.clear_cache()
    made = []
    for i in range(z.shape[2]):
        if i in cuts:
            vae._feat_map = [cache.detach() if isinstance(cache, torch.Tensor) else cache for cache in vae._feat_map]
        made.append(vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=i == 0))
    vae.clear_cache()
    x = torch.cat(made, dim=2)
    if vae.config.patch_size is not None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        x = unpatchify(x, patch_size=vae.config.patch_size)
    return x


@cache
def library_of(name, frames, height=3, batch=1, cuts=()):
    """(latents, ``library_graph`` of them): one graph in fp64 for all tests that compare with it, made under
    ``fp64_throughout``."""
    latents = some_latents(frames, height, batch=batch).requires_grad_()
    return latents, library_graph(vae_of(name), latents, cuts)


def oracle(library, kept, d_frames_BTCHW):
    """The gradient at the latents by one graph; that of saturated pixels as ``InwardClamp`` says it in words."""
    latents, x = library
    d = torch.zeros_like(x)
    d[:, :, list(kept)] = 0.5 * d_frames_BTCHW.transpose(1, 2)
    inside = (x.detach() >= -1) & (x.detach() <= 1)
    comes_back = ((x.detach() > 1) & (d > 0)) | ((x.detach() < -1) & (d < 0))
    return torch.autograd.grad(x, latents, d * (inside | comes_back), retain_graph=True)[0]


def stream_gradient(decoder, latents, kept, window=None, cache_every=1, seed=1, record=0):
    """(gradient at the latents by the stream, the frames, the upstream gradient that was used)"""
    frames, left = decode(decoder, latents, kept, window, cache_every, record)
    visited = len(backward_chunks(kept, decoder.temporal_factor, window))
    traced = min(record, visited)
    assert (len(left.traces), len(left.caches)) == (traced, -(-(visited - traced) // cache_every))
    d_frames = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(frames)
    gradient = vae_backward(decoder, latents, left, d_frames, kept, window)
    assert not left.caches and not left.traces
    return gradient, frames, d_frames


def vae_of(name, dtype=torch.float64, **changes):
    return tiny_vae(dtype, **(CONFIGS[name] | changes))
