"""The tiny decoder: TAEHV's architecture by its key names, chunk by chunk what its formula is as a whole."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from _relay import LIMIT, relative_difference
from _tiny import Z_DIM, tae_weights, tiny_vae
from safetensors.torch import save_file
from torch.nn import functional as F

from lowmem_drf.assembly.sizes import sizes_of
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.generators import KNOWN_GENERATORS, generator_config
from lowmem_drf.models.tiny.decoder import TinyBackward, TinyDecoder
from lowmem_drf.models.tiny.decoder_check import DecoderCheck
from lowmem_drf.models.tiny.files import load_tiny, planned_sizes, sizes_in, tiny_file, toyworld_file
from lowmem_drf.models.tiny.network import Sizes
from lowmem_drf.models.wan.vae.decoder import WanDecoder
from lowmem_drf.schema.generator import Model
from lowmem_drf.types import Compared

VAE = replace(sizes_of(generator_config("toyworld")), channels=Z_DIM, spatial=4, tiny_decoder="")
WAN21, WAN22 = (
    sizes_of(KNOWN_GENERATORS[f"Wan-AI/{name}-Diffusers"].config) for name in ("Wan2.1-T2V-1.3B", "Wan2.2-TI2V-5B")
)
SIZES = {"pixels": Sizes(Z_DIM, (6, 5, 4, 3)), "squares": Sizes(Z_DIM, (4, 5, 4, 6), patch=2)}


def decoder_of(tmp_path, name, dtype=torch.float64):
    save_file(tae_weights(SIZES[name]), tmp_path / "tae.safetensors")
    return TinyDecoder(load_tiny(tmp_path / "tae.safetensors", VAE, dtype, torch.device("cpu")))


def as_a_whole(weights, latents_BCFhw, doubles, patch):
    """TAEHV's formula, all frames at once, layer by layer; not clamped."""
    x = 3 * torch.tanh(latents_BCFhw.transpose(1, 2) / 3)
    weight = {name.removeprefix("decoder."): value.double() for name, value in weights.items()}

    def conv(place, x, padding=1):
        return F.conv2d(x, weight[f"{place}.weight"], weight.get(f"{place}.bias"), padding=padding)

    def each(function, x):
        return function(x.flatten(0, 1)).unflatten(0, (len(x), -1))

    def block(place, x):
        past = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        y = torch.cat([x, past], dim=2)
        for i in (0, 2, 4):
            y = each(lambda z, i=i: conv(f"{place}.conv.{i}", z), y if i == 0 else y.relu())
        return (x + y).relu()

    x = each(lambda z: conv(1, z), x).relu()
    for level in range(3):
        for place in (3, 4, 5):
            x = block(6 * level + place, x)
        if level in doubles:
            x = each(lambda z: F.interpolate(z, scale_factor=2), x)
        frames = x.flatten(0, 1)
        grown = conv(f"{6 * level + 7}.conv", frames, padding=0)
        x = grown.reshape(-1, *frames.shape[1:]).unflatten(0, (len(x), -1))
        x = each(lambda z, level=level: conv(6 * level + 8, z), x)
    return each(lambda z: F.pixel_shuffle(conv(22, z.relu()), patch), x)[:, 3:]


@pytest.mark.parametrize(("name", "doubles"), [("pixels", (1, 2)), ("squares", (2,))])
def test_chunks_and_their_backward_are_the_formula(tmp_path, name, doubles):
    latents = torch.randn(2, Z_DIM, 4, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = as_a_whole(tae_weights(SIZES[name]), latents.requires_grad_(), doubles, SIZES[name].patch)
    decoder = decoder_of(tmp_path, name)
    assert relative_difference(decoder.decode(latents.detach()), whole.clamp(0, 1)) < LIMIT
    outside = (whole < 0) | (whole > 1)
    assert outside.any() and not outside.all()
    for kept, every in (((0,), 1), ((12,), 9), ((0, 5, 6, 11), 2), (tuple(range(13)), 1)):
        frames, caches = decode(decoder, latents.detach(), kept, None, every)
        assert torch.equal(frames, decoder.decode(latents.detach())[:, list(kept)])
        upstream = torch.where(outside[:, list(kept)], 0.0, torch.randn_like(frames))
        (expected,) = torch.autograd.grad(whole[:, list(kept)], latents, upstream, retain_graph=True)
        got = vae_backward(decoder, latents.detach(), caches, upstream, kept)
        assert relative_difference(got, expected) < LIMIT


def test_the_gradients_dtype_is_that_of_a_network_cast_to_it(tmp_path):
    latents = torch.randn(1, Z_DIM, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    plain = decoder_of(tmp_path, "pixels", torch.float32)
    mixed = TinyDecoder(plain.network, grad_dtype=torch.bfloat16)
    frames, left = decode(mixed, latents, (0, 4, 8), None, 2)
    assert torch.equal(frames, decode(plain, latents, (0, 4, 8))[0])
    assert {cache.get().dtype for cache in left.caches[2]} == {torch.bfloat16}
    gradients = []
    for decoder in (mixed, TinyDecoder(deepcopy(plain.network).bfloat16())):
        gradients.append(vae_backward(decoder, latents, deepcopy(left), torch.ones_like(frames), (0, 4, 8)))
    assert torch.equal(*gradients) and gradients[0].dtype == torch.float32


@pytest.mark.parametrize("every", [1, 2])
def test_the_backward_alone_may_be_the_tiny_decoders(tmp_path, every):
    """The frames are the VAE's, and what waits for the backward is the tiny decoder's."""
    latents = torch.randn(2, Z_DIM, 4, 3, 2, generator=torch.Generator().manual_seed(3))
    exact, tiny, kept = WanDecoder(tiny_vae()), decoder_of(tmp_path, "pixels", torch.float32), (0, 5, 11)
    both = TinyBackward(exact, tiny)
    frames, caches = decode(both, latents, kept, None, every)
    assert torch.equal(frames, decode(exact, latents, kept)[0])
    upstream, (_, alone) = torch.randn_like(frames), decode(tiny, latents, kept)
    expected = vae_backward(tiny, latents, alone, upstream, kept)
    assert torch.equal(vae_backward(both, latents, caches, upstream, kept), expected)


def test_other_files_are_refused_with_a_cure(tmp_path):
    file, weights = tmp_path / "file.safetensors", tae_weights(Sizes())
    save_file(weights, file)
    assert sizes_in(file, WAN21) == Sizes() == planned_sizes("a/b", "owner/repo/tae.safetensors", WAN21)
    with pytest.raises(BadInputError, match=r"latents of 16 channels, and the model's have 48.*taew2_2\.safetensors"):
        sizes_in(file, WAN22)
    for change in ({"decoder.9.conv.2.bias": None}, {"decoder.5.conv.0.weight": torch.zeros(256, 256, 3, 3)}):
        (name,) = change
        save_file(
            {key: change.get(key, value) for key, value in weights.items() if change.get(key, 0) is not None}, file
        )
        with pytest.raises(BadInputError, match=rf"{name} has the shape .*taew2_1\.safetensors"):
            sizes_in(file, WAN21)
    save_file({"blocks.0.weight": torch.zeros(2)}, file)
    with pytest.raises(BadInputError, match=r"no weight decoder\.1\.weight"):
        sizes_in(file, WAN21)
    torch.save({}, tmp_path / "taew2_1.pth")
    with pytest.raises(BadInputError, match=r"model\.decoder_file, .*pickle.*taew2_1\.safetensors"):
        tiny_file("a/b", str(tmp_path / "taew2_1.pth"), WAN21, print)
    with pytest.raises(BadInputError, match=r"decoder_file=Kijai/WanVideo_comfy/taew2_1\.safetensors"):
        tiny_file("a/b", "", WAN21, print)
    save_file(tae_weights(Sizes(Z_DIM, (3, 3, 3, 3), growths=(2, 2, 2))), file)
    with pytest.raises(BadInputError, match="makes 8 frames of a latent"):
        load_tiny(file, VAE, torch.float32, torch.device("cpu"))


def test_a_run_goes_back_to_the_vae_below_the_bound():
    assert Compared(0.0, 0.0, 0.0).cosine is None  # every question is answered well enough: nothing was compared
    assert Compared(1.0, 0.0, 0.0).cosine == Compared(math.nan, 0.0, 1.0).cosine == 0
    settings = Model(decoder="tiny", decoder_check_every=3, decoder_least_cosine=0.6)
    check = DecoderCheck(settings)
    assert [check.uses(step) for step in range(4)] == ["both", "tiny", "tiny", "both"]
    assert check.look(1, 0.7) == check.look(2, None) == check.why == ""
    assert "cosine of 0.55 with the VAE's, below model.decoder_least_cosine = 0.6" in check.look(4, 0.55)
    assert check.uses(4) == DecoderCheck(settings, check.fell).uses(6) == "exact"
    lower = DecoderCheck(settings.model_copy(update={"decoder_least_cosine": 0.5}), check.fell)
    assert lower.uses(4) == "tiny" and lower.why == ""
    assert DecoderCheck(Model()).uses(0) == "exact"


def test_toyworld_has_its_own():
    assert planned_sizes("toyworld", "", sizes_of(generator_config("toyworld"))) == sizes_in(toyworld_file(), WAN21)
    assert toyworld_file().stat().st_size < 500_000
