"""LTX-Video: velocity, decode and gradient are those of diffusers' classes; what saves memory changes nothing."""

from dataclasses import replace

import pytest
import torch
from _ltx import CHANNELS, NEWER_VAE, save_tiny_ltx, tiny_ltx_transformer, tiny_ltx_vae
from _plans import FAKES
from _relay import LIMIT, QUESTIONS, STEPS, lora_gradients, plan_of, relative_difference
from _tiny import TEXT_DIM, randomise_lora, tiny_critic
from _trainer import family_preset, lora_of_run
from diffusers.models.normalization import RMSNorm

from lowmem_drf.commands.bench import count_bytes
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.ltx import family as ltx
from lowmem_drf.ops import Attention, naive_ops, sdpa_attention
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.types import Parts

KEPT = (0, 3, 8, 13, 16)
"""Of 17 frames."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_ltx(tmp_path_factory.mktemp("ltx"))


def texts(tokens, seed, dtype=torch.float64):
    """(1, 8, D), of which the first ``tokens`` are the text."""
    made = torch.randn(1, 8, TEXT_DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    made[:, tokens:] = 0
    return made


@pytest.fixture(scope="module")
def parts(folder):
    transformer = ltx.load_transformer(str(folder), torch.float64)
    add_lora(transformer, rank=2, alpha=2.0, targets=ltx.NAMES.linears)
    randomise_lora(transformer)
    ltx.set_activations(transformer)
    decoder = ltx.decoder(ltx.load_vae(str(folder), torch.float64), strips=3)
    return Parts(ltx.as_velocity(transformer), decoder, tiny_critic(torch.float64), lora_parameters(transformer))


@pytest.mark.parametrize("k", [1, 3, STEPS], ids=lambda k: f"K{k}")
def test_relay_is_naive_for_ltx(parts, k):
    noise = draw_noise((CHANNELS, 3, 1, 2), range(2)).double()
    cond, uncond = torch.cat([texts(5, 1), texts(8, 2)]), texts(1, 3).expand(2, -1, -1)
    plan = plan_of(range(STEPS - k, STEPS), guidance=2.0, guidance_grad="both", kept=KEPT)
    expected, naive = lora_gradients(naive_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    actual, stats = lora_gradients(drf_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    assert relative_difference(actual, expected) < LIMIT
    assert stats.reward == pytest.approx(naive.reward, abs=1e-12) and stats.frames_BTCHW.shape[1] == len(KEPT)


@pytest.mark.parametrize(
    "kind", [{}, {"decoder_causal": True}, NEWER_VAE], ids=["looking_ahead", "causal", "with_a_timestep"]
)
def test_frames_and_their_gradient_are_those_of_the_librarys_decode(kind):
    vae = tiny_ltx_vae(torch.float64, **kind)
    for module in vae.decoder.modules():  # theirs take variances in fp32, whose sums depend on the layout
        if isinstance(module, RMSNorm):
            module.forward = lambda x, eps=module.eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    latents = draw_noise((CHANNELS, 3, 2, 1), [0, 1]).double()
    z = latents.clone().requires_grad_()
    denormalised = z * vae.latents_std.view(-1, 1, 1, 1) + vae.latents_mean.view(-1, 1, 1, 1)
    timestep = None
    if "timestep_conditioning" in kind:
        noise, share = draw_noise(latents.shape[1:], [0]).double(), 0.025
        denormalised, timestep = (1 - share) * denormalised + share * noise, torch.full((2,), 0.05).double()
    wanted = (vae.decode(denormalised, timestep).sample * 0.5 + 0.5).transpose(1, 2)
    inside = (wanted > 0) & (wanted < 1)
    assert 0.1 < inside.double().mean() < 1
    d_frames = draw_noise(wanted.shape[1:], [3, 4]).double().where(inside, 0)[:, list(KEPT)]
    (d_wanted,) = torch.autograd.grad(wanted[:, list(KEPT)], z, d_frames)
    for strips, caches, record in ((1, "card", 0), (1, "host", 1), (4, "card", 1), (40, "host", 0)):
        decoder = ltx.decoder(vae, strips=strips, caches=caches, store=HostStore(torch.device("cpu")))
        whole, (frames, left) = decoder.decode(latents), decode(decoder, latents, KEPT, record=record)
        assert strips > 1 or torch.equal(whole, wanted.clamp(0, 1))
        assert relative_difference(whole, wanted.clamp(0, 1)) < 1e-13
        assert torch.equal(frames, whole[:, list(KEPT)])
        d = vae_backward(decoder, latents, left, d_frames, KEPT)
        assert relative_difference(d, d_wanted) < 1e-13


def test_velocity_and_clip_are_those_of_the_pipeline(folder):
    from diffusers import LTXPipeline

    pipe = LTXPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise, prompts = draw_noise((CHANNELS, 3, 2, 1), [0]), ["a red circle moves left", ""]
    packed = noise.flatten(2).transpose(1, 2)
    clip = pipe(
        prompts[0], negative_prompt=prompts[1], height=64, width=32, num_frames=17, frame_rate=10, latents=packed,
        num_inference_steps=3, guidance_scale=2.5, output_type="pt", max_sequence_length=12,
    ).frames  # fmt: skip
    cond, uncond = ltx.load_text(str(folder)).encode(prompts, 12).split(1)
    velocity = ltx.as_velocity(ltx.load_transformer(str(folder)), fps=10)
    x, levels = noise, pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for sigma, after in zip(levels, levels[1:], strict=False):
            v, w = velocity(x, sigma, cond), velocity(x, sigma, uncond)
            x = x + (after - sigma) * (w + 2.5 * (v - w))
        assert relative_difference(ltx.decoder(ltx.load_vae(str(folder))).decode(x), clip) < 1e-4


def test_velocity_of_the_13b_is_that_of_its_pipeline(tmp_path):
    from diffusers import LTXConditionPipeline

    pipe = LTXConditionPipeline.from_pretrained(save_tiny_ltx(tmp_path, newer=True))
    pipe.set_progress_bar_config(disable=True)
    x, prompt = torch.randn(1, CHANNELS, 3, 2, 1, generator=torch.Generator().manual_seed(0)), "a red circle moves left"
    latents = pipe(
        prompt=prompt, height=64, width=32, num_frames=17, frame_rate=10, generator=torch.Generator().manual_seed(0),
        timesteps=[1000, 975, 725], guidance_scale=1.0, output_type="latent", max_sequence_length=12,
    ).frames  # fmt: skip
    velocity = ltx.as_velocity(ltx.load_transformer(str(tmp_path)), fps=10)
    cond = ltx.load_text(str(tmp_path)).encode([prompt], 12)
    with torch.no_grad():
        for sigma, after in ((1, 0.975), (0.975, 0.725), (0.725, 0)):
            x = x + (after - sigma) * velocity(x, sigma, cond)
    assert relative_difference(x, latents) < 1e-5
    assert generator_config(str(tmp_path)).vae["timestep_conditioning"] is True


@pytest.fixture
def preset(folder, tmp_path):
    return family_preset(tmp_path, folder, ltx.NAMES.linears, side=32, frames=17)


def test_it_trains_and_exports_and_what_saves_memory_changes_nothing(preset, tmp_path, capsys):
    plain = lora_of_run(preset, tmp_path / "plain")
    stream = ("memory.checkpoint=true", "memory.stream=['transformer']", "memory.park=['critic','vae']")
    stream = (*stream, "memory.keep_attention=host")
    more = ("memory.record_rollout=true", "memory.record_decode=1", "memory.text_device=stream")
    assert "without effect" not in capsys.readouterr().out
    saving = lora_of_run(preset, tmp_path / "saving", *stream, *more, "memory.token_slices=2")
    assert "without effect on LTX-Video: memory.token_slices" in " ".join(capsys.readouterr().out.split())
    assert plain.keys() == saving.keys() and all(torch.equal(plain[name], saving[name]) for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
    made = export_run(tmp_path / "plain", form="diffusers")
    assert "diffusers (pipe.load_lora_weights)" in str(made) and "Verified" in str(made)
    modules = {f"{ltx.BLOCKS}.{i}.{name}" for i in range(2) for name in ltx.NAMES.linears}
    assert read_lora(made.paths[0]).pairs.keys() == modules
    comfyui = export_run(tmp_path / "plain", form="comfyui")
    assert read_lora(comfyui.paths[0]).pairs.keys() == modules and "Verified" in str(comfyui)
    assert "loads in diffusers (pipe.load_lora_weights)." in str(comfyui)  # no other reader was compared
    with pytest.raises(BadInputError, match="--format comfyui"):
        export_run(tmp_path / "plain", form="kohya")


def test_its_plan_is_what_an_update_takes(preset):
    config = load_config(preset, ["batch=1", "video.width=64", "video.height=64", "video.frames=33"])
    plan, counted = make_plan(config, card_named("rtx4090"), fakes=FAKES), count_bytes(config)
    assert {name: plan.stages[name].peak_gib for name in counted} == pytest.approx(counted, rel=0.05)


def test_what_its_blocks_do_not_bring_is_said(folder):
    transformer = ltx.load_transformer(str(folder))
    called = []
    eight = Attention("sdpa", lambda q, k, v: called.append("graded") or sdpa_attention().call(q, k, v), ())

    def rollout(q, k, v):
        called.append("rollout")
        return sdpa_attention().call(q, k, v)

    rows = replace(naive_ops(), name="fused")
    unused = ltx.set_activations(
        transformer, Activations(False, slices=2, rows=rows, rollout_attention=rollout, graded_attention=eight)
    )
    assert unused == ("kernels.ops", "memory.token_slices")
    noise, velocity = draw_noise((CHANNELS, 3, 2, 1), [0]), ltx.as_velocity(transformer)
    with torch.no_grad():
        plain = velocity(noise, 0.5, texts(5, 1))
    assert torch.equal(velocity(noise, 0.5, texts(5, 1)), plain)
    assert called == ["rollout"] * 2 + ["graded"] * 2
    assert ltx.set_activations(transformer) == ()


def test_parameter_shapes_are_those_of_the_class():
    config = {**tiny_ltx_transformer().config}
    for known in (config, *(known.config.transformer for known in ltx.KNOWN.values())):
        named = ltx.empty_transformer(known).named_parameters()
        assert ltx.parameter_shapes(known) == {name: tuple(parameter.shape) for name, parameter in named}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("video.frames=37", "37 is not 8n [+] 1 .*nearest: 33 or 41"),
        ("video.width=720", "720 is not a multiple of 32; nearest: 704"),
        ("log.sample_frames=37", "log.sample_frames: 37 is not 8n"),
        ("log.sample_height=40", "log.sample_height: 40 is not a multiple of 32"),
    ],
)
def test_sizes_that_its_vae_does_not_make(setting, said):
    with pytest.raises(BadInputError, match=said):
        load_config("rtx4090-ltx", [setting])
    assert load_config("rtx4090-ltx", ["log.sample_frames=33"]).video.frames == 121
    assert load_config("rtx4090", [setting.replace("40", "48")]).video.fps == 16


def test_relatives_are_refused(folder, tmp_path):
    known = ltx.KNOWN["Lightricks/LTX-Video"].config
    newer = {**known.vae, "timestep_conditioning": True}
    for change, said in (
        ({"vae": newer}, "neither the 2B of 0.9.0 nor the 13B"),
        ({"transformer": ltx.KNOWN["Lightricks/LTX-Video-0.9.7-dev"].config.transformer}, "neither"),
        ({"vae": {**known.vae, "patch_size": 8}}, "of 64 pixels"),
        ({"transformer": {**known.transformer, "patch_size": 2}}, "several latents"),
    ):
        with pytest.raises(BadInputError, match=said):
            ltx.refuse(replace(known, **change), "here")
    assert generator_config(str(folder)).vae["decoder_causal"] is False
