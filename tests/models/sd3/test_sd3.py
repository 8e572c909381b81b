"""Stable Diffusion 3.5: text, image and gradient are those of diffusers; a clip of one frame goes all the way."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
from _plans import FAKES
from _relay import LIMIT, QUESTIONS, STEPS, lora_gradients, plan_of, relative_difference
from _sd3 import CHANNELS, CLIP_TOKENS, POOLED, save_tiny_sd3, tiny_sd3_transformer, tiny_sd3_vae
from _tiny import TEXT_DIM, randomise_lora, save_tiny_critic, tiny_critic
from safetensors.torch import load_file as read_file

from lowmem_drf.assembly import conditions
from lowmem_drf.commands.bench import count_bytes
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.sd3 import family as sd3
from lowmem_drf.models.weights import downloads
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.reporting.clips import Files, Room
from lowmem_drf.types import Parts
from lowmem_drf.video import read_video

CPU = torch.device("cpu")
ROWS = 1 + CLIP_TOKENS + 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def parts(folder):
    transformer = sd3.load_transformer(str(folder), torch.float64)
    add_lora(transformer, rank=2, alpha=2.0, targets=sd3.NAMES.linears)
    randomise_lora(transformer)
    sd3.set_activations(transformer)
    decoder = sd3.decoder(sd3.load_vae(str(folder), torch.float64))
    return Parts(sd3.as_velocity(transformer), decoder, tiny_critic(torch.float64), lora_parameters(transformer))


@pytest.mark.parametrize("k", [1, 3, STEPS], ids=lambda k: f"K{k}")
def test_relay_is_naive_for_sd3(parts, k):
    noise = draw_noise((CHANNELS, 1, 2, 4), range(2)).double()
    cond, uncond = (draw_noise((1, 1, 9, TEXT_DIM), seeds)[:, 0, 0].double() for seeds in ([1, 2], [3, 3]))
    plan = plan_of(range(STEPS - k, STEPS), guidance=2.0, guidance_grad="both", kept=(0,))
    expected, naive = lora_gradients(naive_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    actual, stats = lora_gradients(drf_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    assert relative_difference(actual, expected) < LIMIT
    assert stats.reward == pytest.approx(naive.reward, abs=1e-12) and stats.frames_BTCHW.shape[1] == 1


def test_an_image_and_its_gradient_are_those_of_the_librarys_decode():
    vae = tiny_sd3_vae(torch.float64)
    latents = draw_noise((CHANNELS, 1, 3, 2), [0, 1]).double()
    z = latents.clone().requires_grad_()
    wanted = vae.decode(z[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor).sample * 0.5 + 0.5
    inside = (wanted > 0) & (wanted < 1)
    assert 0.1 < inside.double().mean() < 1
    d_frames = draw_noise(wanted[:, None].shape[1:], [3, 4]).double().where(inside[:, None], 0)
    (d_wanted,) = torch.autograd.grad(wanted, z, d_frames[:, 0])
    for caches, record in (("card", 0), ("card", 1), ("host", 0), ("host", 1)):
        decoder = sd3.decoder(vae, caches=caches, store=HostStore(CPU))
        frames, left = decode(decoder, latents, (0,), record=record)
        assert torch.equal(frames[:, 0], wanted.clamp(0, 1)) and torch.equal(decoder.decode(latents), frames)
        assert relative_difference(vae_backward(decoder, latents, left, d_frames, (0,)), d_wanted) < 1e-13


def test_text_and_image_are_those_of_the_pipeline(folder):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise, prompts = draw_noise((CHANNELS, 1, 4, 6), [0]), ["a red circle moves left", ""]
    encoders = list(generator_config(str(folder)).text_encoders)
    assert encoders == [name for name in sd3.KINDS if "text" in name]
    made_BLD = sum(sd3.load_text(str(folder), subfolder=name).encode(prompts, ROWS) for name in encoders)
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, prompts, prompts, max_sequence_length=12)
    assert torch.equal(made_BLD[:, 1:], tokens) and torch.equal(made_BLD[:, 0, :POOLED], pooled)
    image = pipe(
        prompts[0], negative_prompt=prompts[1], height=32, width=48, latents=noise[:, :, 0], num_inference_steps=3,
        guidance_scale=2.5, output_type="pt", max_sequence_length=12,
    ).images  # fmt: skip
    transformer, levels = sd3.load_transformer(str(folder)), pipe.scheduler.sigmas.tolist()
    velocity, (cond, uncond) = sd3.as_velocity(transformer), made_BLD.split(1)
    for change in (lambda model: None, sd3.set_activations):  # diffusers' own forward; one sequence
        change(transformer)
        x = noise
        with torch.no_grad():
            for sigma, after in zip(levels, levels[1:], strict=False):
                v, w = velocity(x, sigma, cond), velocity(x, sigma, uncond)
                x = x + (after - sigma) * (w + 2.5 * (v - w))
            frames = sd3.decoder(sd3.load_vae(str(folder))).decode(x)
        assert frames.shape == (1, 1, 3, 32, 48) and relative_difference(frames[:, 0], image) < 1e-4


@pytest.fixture
def preset(folder, tmp_path):
    critic = save_tiny_critic(tmp_path / "critic")
    (tmp_path / "sd3.toml").write_text(f"""
prompts = "toyworld"
steps = 2
batch = 2
micro_batch = 1
dtype = "fp32"
device = "cpu"
[video]
width = 32
height = 32
frames = 1
[model]
id = "{folder.as_posix()}"
text_tokens = {ROWS}
[sampler]
steps = 3
graded_steps = 2
guidance = 2.0
[critic]
id = "{critic.as_posix()}"
questions = "grammar"
check = false
quant = "none"
frames = 1
[lora]
rank = 2
targets = {json.dumps([*sd3.NAMES.linears])}
[memory]
vae_dtype = "fp32"
[log]
checkpoint_every = 1
sample_every = 2
sample_prompts = 1
sample_first = false
eval_prompts = 0
watch_every = 0
""")
    return str(tmp_path / "sd3.toml")


def run_of(preset, folder, *settings):
    train_command(preset, None, folder, None, None, False, list(settings), False)
    return read_file(folder / "checkpoints" / "step-000002" / "lora.safetensors")


def test_it_trains_shows_and_exports_images_and_what_saves_memory_changes_nothing(preset, tmp_path):
    plain = run_of(preset, tmp_path / "plain")
    stream = ("memory.checkpoint=true", "memory.stream=['transformer']", "memory.park=['critic','vae']")
    more = ("memory.record_rollout=true", "memory.record_decode=1", "memory.text_device=stream")
    saving = run_of(preset, tmp_path / "saving", *stream, *more, "log.sample_every=0")
    assert plain.keys() == saving.keys() and all(torch.equal(plain[name], saving[name]) for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
    asked = json.loads((tmp_path / "plain" / "questions.json").read_text())
    assert not {"direction", "jump", "flicker"} & {q["name"] for row in asked for q in row["questions"]}
    (clip,) = (tmp_path / "plain" / "samples" / "step-000002").glob("*.mp4")
    assert read_video(clip)[0].shape[:2] == (1, 3)
    assert (read_video(clip.with_suffix(".png"))[0] - read_video(clip)[0]).abs().mean() < 0.05
    (shown,) = Room(1).row(Files("a prompt", [("tuned", clip)])).clips  # of the report
    assert shown.url.startswith("data:video/mp4")
    made = export_run(tmp_path / "plain")
    assert "diffusers (pipe.load_lora_weights)" in str(made) and "Verified" in str(made)
    whole = {f"{sd3.BLOCKS}.{i}.{name}" for i in range(2) for name in sd3.NAMES.linears}
    assert whole - read_lora(made.paths[0]).pairs.keys() == {
        *(f"{sd3.BLOCKS}.1.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"{sd3.BLOCKS}.1.{name}" for name in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")),
    }
    assert all(name.startswith("transformer.transformer_blocks.") for name in read_file(made.paths[0]))
    with pytest.raises(BadInputError, match="--format comfyui"):
        export_run(tmp_path / "plain", form="kohya")


@pytest.mark.slow
def test_its_plan_is_what_an_update_takes(preset):
    config = load_config(preset, ["batch=1", "video.width=128", "video.height=128"])
    plan, counted = make_plan(config, card_named("rtx4090"), fakes=FAKES), count_bytes(config)
    assert {name: plan.stages[name].peak_gib for name in counted} == pytest.approx(counted, rel=0.05)


def test_parameter_shapes_are_those_of_the_class():
    for known in (
        {**tiny_sd3_transformer().config},
        sd3.KNOWN["stabilityai/stable-diffusion-3.5-medium"].config.transformer,
    ):
        from diffusers import SD3Transformer2DModel

        with torch.device("meta"):
            theirs = SD3Transformer2DModel.from_config(known).state_dict()
        assert sd3.parameter_shapes(known) == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_text_encoders_are_held_one_after_the_other_and_cached_together(folder, preset, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conditions, "LARGE_BYTES", 1)
    load, seen = sd3.load_text, []

    def watched(*arguments):
        gc.collect()
        assert not any(one() for one in seen)
        encoder = load(*arguments)
        seen.append(weakref.ref(encoder.model))
        return encoder

    monkeypatch.setattr(sd3, "load_text", watched)
    config, texts = load_config(preset), ["a red circle", "", "a red circle"]
    first = conditions.encode_texts(config, str(folder), texts, CPU)
    assert len(seen) == 3 and all(row.shape == (ROWS, TEXT_DIM) for row in first.values())
    again = conditions.encode_texts(config, str(folder), texts, CPU)
    assert len(seen) == 3 and all(torch.equal(first[text], again[text]) for text in texts)
    with pytest.raises(BadInputError, match="model.text_tokens = 8 is too few"):
        conditions.encode_texts(load_config(preset, ["model.text_tokens=8"]), str(folder), texts, CPU)


def test_all_encoders_and_tokenizers_are_downloaded_and_missed(tmp_path):
    place = save_tiny_sd3(tmp_path)
    here = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
    wanted = downloads._wanted(
        "owner/name", "generator", [*here, "turbo.safetensors", "text_encoders/x.safetensors"], ()
    )
    assert set(wanted) == {name for name in here if not name.startswith("scheduler/")}
    (place / "text_encoder_3" / "model.safetensors").unlink()
    (place / "tokenizer_2").rename(place / "tokenizer_4")
    with pytest.raises(BadInputError, match="(?s)text_encoder_3/.*tokenizer_2/"):
        downloads.prepare(str(place), "generator", print)
    (place / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(BadInputError, match="lacks text_encoder_2/config.json"):
        generator_config(str(place))


def test_what_makes_no_image_or_is_another_model_is_refused(preset):
    with pytest.raises(BadInputError, match="frames: 81: the generator makes images; set 1"):
        load_config("rtx3060-sd35", ["video.frames=81"])
    with pytest.raises(BadInputError, match="height: 1000 is not a multiple of 16; nearest: 992"):
        load_config("rtx3060-sd35", ["video.height=1000"])
    with pytest.raises(BadInputError, match="makes images. Set -s video.frames=1"):
        make_plan(load_config(preset, ["video.frames=5"]), card_named("rtx4090"), fakes=FAKES)
    known = sd3.KNOWN["stabilityai/stable-diffusion-3.5-medium"].config
    for change, said in (
        ({"transformer": {**known.transformer, "caption_projection_dim": 24}}, "24 numbers a token and its image 1536"),
        ({"vae": {**known.vae, "use_post_quant_conv": True}}, "a layer before its decoder"),
    ):
        with pytest.raises(BadInputError, match=said):
            sd3.refuse(replace(known, **change), "here")
