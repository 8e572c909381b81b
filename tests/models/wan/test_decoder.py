"""The Wan decoder in chunks is the Wan decoder: bitwise forward, and the same gradient when chunks are recomputed in
reverse."""

from __future__ import annotations

import pytest
import torch
from _tiny import relative_difference, save_tiny_generator, tiny_latents, tiny_vae
from _vae import CONFIGS
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.vae.decoder import WanDecoder, drop_encoder, load_vae


def chunked(decoder: WanDecoder, latents: Tensor) -> tuple[list[Tensor], list[tuple]]:
    """Frames of every chunk and the caches that enter each."""
    frames, entering, caches = [], [], decoder.start(latents.shape[0])
    for i in range(latents.shape[2]):
        entering.append(caches)
        out, caches = decoder.chunk(latents[:, :, i : i + 1], caches)
        frames.append(out)
    return frames, entering


BITWISE = [(config, dtype) for config in CONFIGS for dtype in (torch.float32, torch.float64, torch.bfloat16)]
# Here one frame and four frames go through different fp64 kernels of the pointwise post_quant_conv: 2e-16 apart (held
# by the gradient test
# below).
BITWISE.remove(("wan22", torch.float64))


@pytest.mark.parametrize(("config", "dtype"), BITWISE, ids=str)
def test_chunks_are_bitwise_decode(config: str, dtype: torch.dtype) -> None:
    vae = tiny_vae(dtype, **CONFIGS[config])
    decoder, latents = WanDecoder(vae), tiny_latents(2, frames=4, dtype=dtype)
    with torch.no_grad():
        frames, _ = chunked(decoder, latents)
        mean, inverse_std = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        library = vae.decode(latents / (1.0 / inverse_std).to(dtype) + mean.to(dtype)).sample
    assert [f.shape[1] for f in frames] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(frames, dim=1), decoder.decode(latents))
    assert torch.equal(torch.cat(frames, dim=1), (library * 0.5 + 0.5).transpose(1, 2))


def test_frames_stay_in_range_and_the_clamp_is_exercised() -> None:
    frames = WanDecoder(tiny_vae()).decode(tiny_latents(2, frames=3, dtype=torch.float32))
    assert frames.shape == (2, 9, 3, 16, 16)
    assert frames.min() == 0 and frames.max() == 1
    assert 0.5 < ((frames > 0) & (frames < 1)).float().mean() < 1


def test_chunk_is_pure() -> None:
    decoder, latents = WanDecoder(tiny_vae()), tiny_latents(1, frames=3, dtype=torch.float32)
    frames, entering = chunked(decoder, latents)
    before = [[c.clone() if isinstance(c, Tensor) else c for c in caches] for caches in entering]
    again = [decoder.chunk(latents[:, :, i : i + 1], caches)[0] for i, caches in reversed(list(enumerate(entering)))]
    assert all(torch.equal(a, b) for a, b in zip(reversed(again), frames, strict=True))
    for kept, caches in zip(before, entering, strict=True):
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(kept, caches, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_reverse_time_gradient_is_the_monolithic_one(config: str) -> None:
    decoder = WanDecoder(tiny_vae(torch.float64, **CONFIGS[config]))
    latents = tiny_latents(2, frames=4).requires_grad_()
    whole = decoder.decode(latents)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(whole, latents, upstream)

    with torch.no_grad():
        _, entering = chunked(decoder, latents.detach())
    got, cotangents, starts = torch.zeros_like(wanted), {}, [0, 1, 5, 9, 13]
    for i in reversed(range(4)):
        x = latents.detach()[:, :, i : i + 1].requires_grad_()
        caches = tuple(c.detach().requires_grad_() if isinstance(c, Tensor) else c for c in entering[i])
        with torch.enable_grad():
            frames, handed_on = decoder.chunk(x, caches)
        outputs = [frames, *(handed_on[j] for j in cotangents)]
        inputs = {j: c for j, c in enumerate(caches) if isinstance(c, Tensor)}
        grads = torch.autograd.grad(
            outputs,
            [x, *inputs.values()],
            [upstream[:, starts[i] : starts[i + 1]], *cotangents.values()],
            allow_unused=True,
        )
        got[:, :, i : i + 1] = grads[0]
        cotangents = {j: g for j, g in zip(inputs, grads[1:], strict=True) if g is not None}
    assert relative_difference(got, wanted) < 1e-10


def test_load_vae(tmp_path) -> None:
    vae = load_vae(str(save_tiny_generator(tmp_path)))
    latents = tiny_latents(1, dtype=torch.float32)
    assert torch.equal(WanDecoder(vae).decode(latents), WanDecoder(tiny_vae()).decode(latents))
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    with pytest.raises(BadInputError, match="Cannot load the VAE from"):
        load_vae(str(tmp_path / "nowhere"))


def test_weights_of_another_vae_are_refused(tmp_path) -> None:
    """diffusers only warns, and leaves what it misses at random."""
    folder = save_tiny_generator(tmp_path)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"num_res_blocks": 1', '"num_res_blocks": 2'))
    with pytest.raises(BadInputError, match="lack"):
        load_vae(str(folder))


def test_without_its_encoder_a_vae_decodes_as_before() -> None:
    vae = tiny_vae()
    latents = torch.randn(1, vae.config.z_dim, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted, weights = WanDecoder(vae).decode(latents), sum(p.nbytes for p in vae.parameters())
    drop_encoder(vae)
    assert torch.equal(WanDecoder(vae).decode(latents), wanted)
    assert sum(p.nbytes for p in vae.parameters()) < 0.75 * weights
