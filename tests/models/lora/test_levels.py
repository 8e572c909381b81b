"""A LoRA that is used at low noise alone: in which steps, and what clips make of it."""

import pytest
import torch
from _root import ROOT
from _tiny import randomise_lora, tiny_condition, tiny_latents, tiny_text, tiny_transformer, tiny_vae
from safetensors.torch import save_file

from lowmem_drf.assembly.generate import generate
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.lora.adapter import add_lora, lora_scale, lora_state
from lowmem_drf.models.lora.levels import first_step, require_use, up_to
from lowmem_drf.models.wan.denoiser import as_velocity
from lowmem_drf.models.wan.text import TextEncoder
from lowmem_drf.prompts import as_prompts
from lowmem_drf.shared.tuned import choose
from lowmem_drf.training.previews import as_previewed


@torch.no_grad()
def test_it_is_there_up_to_its_level_and_above_the_model_is_bitwise_the_base():
    transformer = tiny_transformer()
    add_lora(transformer, rank=2, alpha=4.0)
    randomise_lora(transformer)
    whole = as_velocity(transformer)
    limited = up_to(0.5, whole, transformer)
    x, cond = tiny_latents(1), tiny_condition(1)
    assert up_to(1.0, whole, transformer) is whole
    with lora_scale(transformer, 0.0):
        base = {sigma: whole(x, sigma, cond) for sigma in (0.9, 0.5)}
        assert all(torch.equal(limited(x, sigma, cond), base[sigma]) for sigma in base)
    assert torch.equal(limited(x, 0.9, cond), base[0.9]) and not torch.equal(whole(x, 0.9, cond), base[0.9])
    assert torch.equal(limited(x, 0.5, cond), whole(x, 0.5, cond)) and not torch.equal(base[0.5], whole(x, 0.5, cond))


def config(*settings):
    """Sigmas 1, 0.94, 0.83, 0.63."""
    return load_config("toy-fast", ["lora.max_sigma=0.9", *settings])


def test_clips_have_it_in_the_last_steps_alone():
    prompts = as_prompts(["a red circle moves right"])
    models = load_models(config(), prompts, with_critic=False)
    add_lora(models.transformer, rank=2, alpha=2.0)
    randomise_lora(models.transformer)
    sampler = config().sampler
    sigmas = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps)
    noise, cond = models.noise([3]), models.condition(prompts)
    with lora_scale(models.transformer, 0.0):
        _, base = rollout(models.velocity, sigmas, noise, cond, cond, keep=(2,))
    tuned, entering = rollout(models.velocity, sigmas, noise, cond, cond, keep=(2,))
    assert not torch.equal(entering[2], base[2])
    late, _ = rollout(models.velocity, sigmas[2:], base[2], cond, cond)
    seen = generate(models, sampler, prompts, [3]).frames_BTCHW
    assert torch.equal(seen, models.decoder.decode(late)) and not torch.equal(seen, models.decoder.decode(tuned))


def test_the_callback_of_the_docs_is_what_our_sampler_does(tmp_path, monkeypatch):
    """docs/lora.md's code for diffusers, run as it stands there."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    code = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    mine, noise = tiny_transformer(), tiny_latents(1, dtype=torch.float32)
    for number, name in enumerate(("distilled", "tuned")):
        if number:
            mine.fuse_lora()
            mine.unload_lora()
        add_lora(mine, rank=2, alpha=2.0)
        randomise_lora(mine, seed=number)
        tensors = {f"transformer.{key}": tensor.contiguous() for key, tensor in lora_state(mine).items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_text()
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1)
    scheduler = UniPCMultistepScheduler(**flow, disable_corrector=list(range(5)))
    pipe = WanPipeline(tokenizer, model, tiny_vae(), scheduler, tiny_transformer())
    pipe.set_progress_bar_config(disable=True)
    size = dict(height=16, width=16, num_frames=9, num_inference_steps=5, max_sequence_length=12)
    settings = dict(**size, output_type="latent", latents=noise, guidance_scale=1.0)
    told = {"pipe": pipe, "prompt": "a red circle", "settings": settings}
    exec(code, told)
    sigmas, velocity = pipe.scheduler.sigmas.double(), as_velocity(mine)
    first, count = told["first"], pipe.num_timesteps
    assert 0 < first < count == 5
    level = (sigmas[first - 1] + sigmas[first]).item() / 2
    cond = TextEncoder(model, tokenizer).encode(["a red circle"], 12)
    ours, _ = rollout(up_to(level, velocity, mine), sigmas, noise, cond, cond)
    limit = 5 * 16 * torch.finfo(torch.float32).eps * ours.abs().max()  # as in tests/models/wan/test_denoiser.py
    assert (ours - told["clip"]).abs().max() < limit
    again = pipe(told["prompt"], callback_on_step_end=told["late"], **settings).frames
    assert torch.equal(again, told["clip"])  # the tuned LoRA is off again
    everywhere, _ = rollout(velocity, sigmas, noise, cond, cond)
    assert (everywhere - ours).abs().max() > limit


def test_where_it_would_be_used_in_no_step_that_is_said():
    assert first_step(config()) == 2 and first_step(config("lora.max_sigma=0.7")) == 3
    require_use(config())
    with pytest.raises(BadInputError, match=r"in no denoising step .* the last one is at sigma 0\.626"):
        require_use(config("lora.max_sigma=0.6"))
    with pytest.raises(BadInputError, match=r'model\.expert = "high"'):
        config("model.expert=high")


@pytest.mark.parametrize("name", ["toy", "toy-fast", "rtx4090", "rtx4090-20step", "rtx4090-ltx", "rtx4090-cogvideox"])
def test_of_no_preset_the_first_step_is_lost_to_rounding(name):
    assert first_step(load_config(name, ["lora.max_sigma=1"])) == 0


def test_what_is_merged_cannot_be_left_out(tmp_path):
    """A LoKr is there in all steps; above its level the model would not be the base."""
    names = {"lokr_w1": (2, 2), "lokr_w2": (64, 64), "alpha": ()}
    tensors = {f"diffusion_model.blocks.0.self_attn.q.{name}": torch.ones(shape) for name, shape in names.items()}
    save_file(tensors, file := tmp_path / "lokr.safetensors")
    assert choose(None, "toy-fast", file).is_merged
    with pytest.raises(BadInputError, match=r"is there in all steps: lora\.max_sigma = 0\.9 cannot leave it out"):
        choose(None, "toy-fast", file, ["lora.max_sigma=0.9"])


def test_sample_clips_of_few_steps_are_not_the_bases_unsaid():
    previewed = config("lora.max_sigma=0.7", "log.sample_steps=2")  # sigmas 1, 0.83
    require_use(previewed)
    models = load_models(previewed, as_prompts(["a red circle moves right"]), with_critic=False)
    with pytest.raises(BadInputError, match=r"log\.sample_steps = 2; the last one is at sigma 0\.83"):
        as_previewed(previewed, models)
