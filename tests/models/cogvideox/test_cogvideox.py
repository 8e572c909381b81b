"""CogVideoX: rollout, decode and gradient are those of diffusers' classes; what saves memory changes nothing."""

from dataclasses import replace

import pytest
import torch
from _cogvideox import (
    CHANNELS,
    TOKENS,
    save_tiny_cogvideox,
    tiny_cogvideox_scheduler,
    tiny_cogvideox_transformer,
    tiny_cogvideox_vae,
)
from _plans import FAKES, peaks_of_chunks
from _relay import LIMIT, QUESTIONS, STEPS, lora_gradients, plan_of, relative_difference
from _tiny import TEXT_DIM, randomise_lora, tiny_critic
from _trainer import family_preset, lora_of_run

from lowmem_drf.commands.bench import count_stages
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import drf_step, rollout
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.cogvideox import family as cogvideox
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.lora.keys import family_with
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.sampling.levels import ddim_levels
from lowmem_drf.types import Parts

KEPT = (0, 3, 8, 9, 16)
"""Of 17 frames, which two chunks make: nine and eight."""
KINDS = {"2b": 3.0, "5b": 1.0}
"""And their ``snr_shift_scale``."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny_cogvideox(tmp_path_factory.mktemp(kind), rotary=kind == "5b") for kind in KINDS}


@pytest.fixture(scope="module")
def parts(folders, kind):
    transformer = cogvideox.load_transformer(str(folders[kind]), torch.float64)
    add_lora(transformer, rank=2, alpha=2.0, targets=cogvideox.NAMES.linears)
    randomise_lora(transformer)
    cogvideox.set_activations(transformer)
    decoder = cogvideox.decoder(cogvideox.load_vae(str(folders[kind]), torch.float64), strips=2)
    velocity = cogvideox.as_velocity(transformer)
    return Parts(velocity, decoder, tiny_critic(torch.float64), lora_parameters(transformer))


@pytest.mark.parametrize(("kind", "k"), [("2b", 1), ("5b", 3), ("2b", STEPS)], indirect=["kind"])
def test_relay_is_naive_for_cogvideox(parts, kind, k):
    noise = draw_noise((CHANNELS, 5, 2, 2), range(2)).double()
    cond, uncond = (draw_noise((1, 1, TOKENS, TEXT_DIM), seeds)[:, 0, 0].double() for seeds in ([1, 2], [3, 3]))
    plan = plan_of(range(STEPS - k, STEPS), guidance=2.0, guidance_grad="both", kept=KEPT)
    plan = replace(plan, sigmas=flow_sigmas(STEPS, 1.0, ddim_levels(KINDS[kind], STEPS)))
    expected, naive = lora_gradients(naive_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    actual, stats = lora_gradients(drf_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    assert relative_difference(actual, expected) < LIMIT
    assert stats.reward == pytest.approx(naive.reward, abs=1e-12) and stats.frames_BTCHW.shape[1] == len(KEPT)


def test_chunks_and_their_gradient_are_those_of_the_librarys_decode():
    vae = tiny_cogvideox_vae(torch.float64)
    latents = draw_noise((CHANNELS, 5, 2, 3), [0, 1]).double()
    z = latents.clone().requires_grad_()
    wanted = (vae.decode(1 / vae.config.scaling_factor * z).sample * 0.5 + 0.5).transpose(1, 2)
    inside = (wanted > 0) & (wanted < 1)
    assert 0.1 < inside.double().mean() < 1
    d_frames = draw_noise(wanted.shape[1:], [3, 4]).double().where(inside, 0)[:, list(KEPT)]
    (d_wanted,) = torch.autograd.grad(wanted[:, list(KEPT)], z, d_frames)
    wanted = wanted.detach().clamp(0, 1)
    for strips, caches, record in ((1, "card", 0), (3, "host", 1), (40, "card", 2)):
        decoder = cogvideox.decoder(vae, strips=strips, caches=caches, store=HostStore(torch.device("cpu")))
        with torch.no_grad():
            whole = decoder.decode(latents)
        frames, left = decode(decoder, latents, KEPT, record=record)
        assert strips > 1 or torch.equal(whole, wanted)
        assert relative_difference(whole, wanted) < 1e-13 and torch.equal(frames, whole[:, list(KEPT)])
        assert relative_difference(vae_backward(decoder, latents, left, d_frames, KEPT), d_wanted) < 1e-13
    decoder = cogvideox.decoder(vae, strips=3, grad_dtype=torch.float32)
    _, left = decode(decoder, latents, KEPT, record=1)
    assert 0 < relative_difference(vae_backward(decoder, latents, left, d_frames, KEPT), d_wanted) < 1e-5
    one = latents[:, :, :1]
    assert torch.equal(decoder.decode(one), (vae.decode(1 / 0.7 * one).sample * 0.5 + 0.5).clamp(0, 1).transpose(1, 2))


@pytest.mark.parametrize(("kind", "guidance"), [("2b", 1.0), ("2b", 6.0), ("5b", 6.0)], indirect=["kind"])
def test_rollout_and_clip_are_those_of_the_pipeline(folders, kind, guidance):
    from diffusers import CogVideoXPipeline

    folder = str(folders[kind])
    pipe = CogVideoXPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise, prompts = draw_noise((CHANNELS, 3, 4, 6), [0]), ["a red circle moves left", ""]
    wanted = {
        output: pipe(
            prompts[0], negative_prompt=prompts[1], height=16, width=24, num_frames=9, latents=noise.transpose(1, 2),
            num_inference_steps=4, guidance_scale=guidance, output_type=output, max_sequence_length=TOKENS,
        ).frames
        for output in ("latent", "pt")
    }  # fmt: skip
    cond, uncond = cogvideox.load_text(folder).encode(prompts, TOKENS).split(1)
    sigmas = flow_sigmas(4, 1.0, ddim_levels(KINDS[kind], 4))
    transformer = cogvideox.load_transformer(folder)
    for joint in (False, True):
        if joint:
            cogvideox.set_activations(transformer)
        latents, _ = rollout(cogvideox.as_velocity(transformer), sigmas, noise, cond, uncond, guidance)
        assert relative_difference(latents, wanted["latent"].transpose(1, 2)) < 1e-5
    with torch.no_grad():
        frames = cogvideox.decoder(cogvideox.load_vae(folder)).decode(latents)
    assert relative_difference(frames, wanted["pt"]) < 1e-5


@pytest.mark.parametrize(("model", "shift"), [("zai-org/CogVideoX-2b", 3.0), ("THUDM/CogVideoX-5b", 1.0)])
def test_the_levels_are_those_of_the_published_scheduler(model, shift):
    scheduler = tiny_cogvideox_scheduler(shift)
    alphas, noise = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    for setting, steps in (("seed=0", 50), ("sampler.steps=25", 25)):
        config = load_config("rtx4090-cogvideox", [f"model.id={model}", setting])
        scheduler.set_timesteps(steps)
        levels = 1000 * (noise / (alphas + noise))[scheduler.timesteps]
        assert config.sampler.timesteps == pytest.approx(levels.tolist(), rel=1e-12)
        assert config.sampler.guidance == 6.0 and config.sampler.timesteps[0] == 1000
    assert load_config("rtx4090-cogvideox", [f"model.id={model}", "sampler.timesteps=[]"]).sampler.timesteps == []


@pytest.fixture
def preset(folders, tmp_path):
    return family_preset(tmp_path, folders["2b"], cogvideox.NAMES.linears, side=16, frames=17)


def test_it_trains_and_exports_and_what_saves_memory_changes_nothing(preset, tmp_path):
    plain = lora_of_run(preset, tmp_path / "plain")
    stream = ("memory.checkpoint=true", "memory.stream=['transformer']", "memory.park=['critic','vae']")
    more = ("memory.record_rollout=true", "memory.record_decode=1", "memory.text_device=stream")
    saving = lora_of_run(preset, tmp_path / "saving", *stream, *more, "memory.vae_caches=host")
    assert plain.keys() == saving.keys() and all(torch.equal(plain[name], saving[name]) for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
    made = export_run(tmp_path / "plain")
    assert "diffusers (pipe.load_lora_weights)" in str(made) and "Verified" in str(made)
    modules = {f"{cogvideox.BLOCKS}.{i}.{name}" for i in range(2) for name in cogvideox.NAMES.linears}
    lora = read_lora(made.paths[0])
    assert lora.pairs.keys() == modules and family_with(lora.pairs) is cogvideox  # LTX-Video has these modules too
    with pytest.raises(BadInputError, match="comfyui format is not written for CogVideoX: .* --format diffusers"):
        export_run(tmp_path / "plain", form="comfyui")


def test_repeated_chunks_take_as_much_of_the_host_as_the_first():
    """In a plan. Caches that wait on the host are stored and handed on, and are a part of the trace."""
    vae, latents = tiny_cogvideox_vae(), draw_noise((CHANNELS, 9, 1, 1), [0])
    whole, short = (
        peaks_of_chunks(cogvideox.decoder(vae, caches="host", store=planned_store()), latents, short, record=1)
        for short in (False, True)
    )
    assert short == whole


@pytest.mark.slow
def test_its_plan_is_what_an_update_takes(preset):
    size = ("video.width=48", "video.height=64", "video.frames=33")  # four chunks, of which one repeats
    config = load_config(preset, ["batch=1", *size, "memory.vae_strips=2", "memory.vae_caches=host"])
    plan, counted = make_plan(config, card_named("rtx4090"), fakes=FAKES), count_stages(config)
    for name, real in counted.items():
        assert plan.stages[name].peak_gib == pytest.approx(real.peak_gib, rel=0.05), name
        assert plan.stages[name].host_gib == pytest.approx(real.host_gib, rel=0.01), name


def test_parameter_shapes_are_those_of_the_class():
    tiny = [{**tiny_cogvideox_transformer(rotary=rotary).config} for rotary in (False, True)]
    for config in (*tiny, cogvideox.KNOWN["zai-org/CogVideoX-2b"].config.transformer | {"num_layers": 3}):
        named = cogvideox.empty_transformer(config).named_parameters()
        assert cogvideox.parameter_shapes(config) == {name: tuple(parameter.shape) for name, parameter in named}


def test_relatives_and_sizes_that_are_refused(preset, folders):
    known = cogvideox.KNOWN["zai-org/CogVideoX-2b"].config
    for change, said in (
        ({"transformer": {**known.transformer, "in_channels": 32}}, "takes an image"),
        ({"transformer": {**known.transformer, "patch_size_t": 2}}, "several latent frames"),
        ({"vae": {**known.vae, "use_post_quant_conv": True}}, "post_quant_conv"),
    ):
        with pytest.raises(BadInputError, match=said):
            cogvideox.refuse(replace(known, **change), "here")
    velocity = cogvideox.as_velocity(tiny_cogvideox_transformer())
    with pytest.raises(BadInputError, match="12 tokens, padding included, and these have 16: -s model.text_tokens=12"):
        velocity(torch.zeros(1, CHANNELS, 3, 4, 4), 1.0, torch.zeros(1, 16, TEXT_DIM))
    with pytest.raises(BadInputError, match="45 is not 8n [+] 1 .*nearest: 41 or 49"):
        load_config("rtx4090-cogvideox", ["video.frames=45"])
    with pytest.raises(BadInputError, match="video.frames = 21 is not 8n [+] 1, .*Nearest: -s video.frames=17"):
        make_plan(load_config(preset, ["video.frames=21"]), card_named("rtx4090"), fakes=FAKES)
