"""What is planned for LTX-2 (``bench.plans.ltx2``) is the computation of diffusers' classes."""

import pytest
import torch
from _relay import relative_difference
from _tiny import _seeded, _spread, randomise_lora

from bench.plans import ltx2
from bench.plans.fit import PAGE
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters


@pytest.fixture
def transformer():
    from diffusers import LTX2VideoTransformer3DModel

    with _seeded(0) as generator:
        model = LTX2VideoTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_num_attention_heads=2,
            audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2, caption_channels=16,
            rope_type="split",
        )  # fmt: skip
        _spread(model, 0.8, generator)
    model = model.double().eval().requires_grad_(False)
    add_lora(model, rank=2, alpha=2.0, targets=ltx2.TARGETS)
    randomise_lora(model)
    return model


def test_packed_blocks_and_their_gradient_are_diffusers_own(transformer):
    noise, text = draw_noise((128, 3, 2, 1), [0]).double(), draw_noise((1, 1, 6, 16), [1])[:, 0, 0].double()
    cotangent = draw_noise(noise.shape[1:], [2]).double()

    def passed():
        x = noise.clone().requires_grad_()
        v = ltx2.as_velocity(transformer)(x, 0.7, text)
        return v.detach(), torch.autograd.grad(v, [x, *lora_parameters(transformer)], cotangent)

    plain, gradients = passed()
    ltx2.set_activations(transformer)
    checkpointed, again = passed()
    assert relative_difference(checkpointed, plain) < 1e-14
    assert all(relative_difference(one, other) < 1e-12 for one, other in zip(again, gradients, strict=True))
    with torch.no_grad():
        assert relative_difference(ltx2.as_velocity(transformer)(noise, 0.7, text), plain) < 1e-14


def test_its_segments_are_diffusers_decode():
    from diffusers import AutoencoderKLLTX2Video

    with _seeded(0):
        vae = AutoencoderKLLTX2Video(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, decoder_causal=False,
            spatial_compression_ratio=32, temporal_compression_ratio=8,
        )  # fmt: skip
    vae = vae.double().eval().requires_grad_(False)
    latents = draw_noise((4, 3, 2, 3), [0]).double()
    wanted = (vae.decode(latents).sample * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)
    assert relative_difference(ltx2.decoder(vae, strips=3).decode(latents), wanted) < 1e-12


def test_its_plan_is_on_the_page():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| LTX-2 |")]
    assert [row.split(" | ")[1] for row in rows] == ["RTX 4090", "RTX 4080"]
