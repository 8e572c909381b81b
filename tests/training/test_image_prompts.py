"""Runs of generators whose clips begin with an image: what a prompt file, ``sample`` and a plan make of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _trainer import PROMPTS, family_preset, lora_of_run
from _wan_images import KINDS, save_tiny_i2v, tiny_image
from PIL import Image

from lowmem_drf.api import sample
from lowmem_drf.assembly.generate import generate
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.questions import questions_command
from lowmem_drf.commands.sample import sample_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import family_of, generator_config
from lowmem_drf.prompts import fingerprint, load_prompts
from lowmem_drf.training.run_folder import own_prompts
from lowmem_drf.types import Prompt
from lowmem_drf.video import read_image

TARGETS = ("attn1.to_q", "attn2.to_k", "ffn.net.2")
SAVED = ('memory.checkpoint="host"', "memory.record_rollout=true")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lowmem_drf.assembly.conditions.LARGE_BYTES", 1)
    return tmp_path / "cache" / "images"


def prompt_file(folder, name: str, seed: int, count: int = 3) -> str:
    """A jsonl file of prompts with an image each, of another shape than the clips."""
    rows = []
    for i, text in enumerate(PROMPTS[:count]):
        tiny_image(48, 32, seed + i).save(folder / f"{name}{i}.png")
        rows.append(json.dumps({"prompt": text, "image": f"{name}{i}.png"}))
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return str(folder / f"{name}.jsonl")


def test_a_run_learns_with_its_images(cache, tmp_path) -> None:
    """Savings change nothing, images are encoded once, the critic is asked about them, and ``sample`` begins with the
    one that it is given."""
    preset = family_preset(tmp_path, save_tiny_i2v(tmp_path / "generator", "wan2.1-i2v"), TARGETS, 16, 5)
    own = (f"prompts={prompt_file(tmp_path, 'a', 0)}", "critic.questions=phrases")
    plain = lora_of_run(preset, tmp_path / "plain", *own)
    saved = lora_of_run(preset, tmp_path / "saved", *own, *SAVED)
    assert len([*cache.iterdir()]) == 3
    assert all(torch.equal(plain[name], saved[name]) for name in plain)
    asked = json.loads((tmp_path / "plain" / "questions.json").read_text())
    assert all(sum(one.get("name") == "first_frame" for one in row["questions"]) == 2 for row in asked)
    prompts = [{"prompt": PROMPTS[0], "image": str(tmp_path / f"a{i}.png")} for i in (0, 1)]
    one, other = (clip.frames() for clip in sample(tmp_path / "plain", prompts=prompts))
    assert not torch.equal(one, other)


def test_a_clip_of_ti2v_begins_with_the_image_or_has_none(cache, tmp_path) -> None:
    generator = save_tiny_i2v(tmp_path / "generator", "wan2.2-ti2v")
    preset = family_preset(tmp_path, generator, TARGETS, 32, 5)
    config = load_config(preset, [])
    (prompt,) = load_prompts(prompt_file(tmp_path, "a", 0, 1))
    models = load_models(config, [prompt], with_critic=False)
    ends = []
    decode = models.decoder.decode
    models.decoder.decode = lambda x: ends.append(x) or decode(x)
    generate(models, config.sampler, [prompt], [3])
    (image,) = models.images.values()
    # x - sigma * ((x - image) / sigma): four roundings of numbers up to |image| + 5, noise being below that
    most = 4 * torch.finfo(torch.float32).eps / 2 * (image.latents_CFhw.abs().max().item() + 5)
    torch.testing.assert_close(ends[0][0, :, :1], image.latents_CFhw, rtol=0, atol=most)


def test_images_that_fit_no_model_are_refused(cache, tmp_path, tiny_preset) -> None:
    file = prompt_file(tmp_path, "a", 0)
    with pytest.raises(BadInputError, match=r"prompt 0001 \(.*\) has an image, and .* makes clips of text alone"):
        lora_of_run(str(tiny_preset), tmp_path / "run", f"prompts={file}", "critic.questions=phrases")
    generator = save_tiny_i2v(tmp_path / "generator", "wan2.1-i2v")
    preset = family_preset(tmp_path, generator, TARGETS, 16, 5)
    with pytest.raises(BadInputError, match="begins every clip with one"):
        lora_of_run(preset, tmp_path / "run")
    with pytest.raises(BadInputError, match="after which a clip of one frame has nothing to make"):
        one = "video.frames=1", "critic.frames=1", "critic.questions=phrases"
        lora_of_run(preset, tmp_path / "run", f"prompts={file}", *one)
    assert not (tmp_path / "run").exists()
    (tmp_path / "a1.png").write_text("no picture")
    with pytest.raises(BadInputError, match=r"a1\.png cannot be read as an image"):
        lora_of_run(preset, tmp_path / "run", f"prompts={file}", "critic.questions=phrases")
    with pytest.raises(BadInputError, match="--image: give its prompt"):
        sample_command(None, None, [], None, tmp_path / "a0.png", preset=preset)


def test_a_prompt_file_names_images_and_a_run_remembers_them(tmp_path) -> None:
    one, other = (load_prompts(prompt_file(tmp_path, name, 0)) for name in "ab")
    assert one[0].image == str(tmp_path / "a0.png") and fingerprint(one) == fingerprint(other)  # the same images
    tiny_image(48, 32, 9).save(tmp_path / "b1.png")
    assert fingerprint(one) != fingerprint(other)
    plain = Prompt("1", "a dog", (), "a.mp4"), Prompt("2", "a cat")
    assert fingerprint(plain).startswith("a4e55f334add57fc")  # as of earlier versions, whose runs go on
    (tmp_path / "c.jsonl").write_text('{"prompt": "a dog", "image": "none.png"}')
    with pytest.raises(BadInputError, match="image 'none.png' does not exist"):
        load_prompts(tmp_path / "c.jsonl")


def test_a_program_names_images_from_where_it_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_image().save("first.png")
    with own_prompts(tmp_path / "run", [{"prompt": "a dog", "image": Path("first.png")}, "a cat"]) as file:
        assert [prompt.image for prompt in load_prompts(file)] == [str(tmp_path / "first.png"), None]


def test_gray_images_of_16_bits_are_read_as_those_of_8(tmp_path) -> None:
    levels = np.asarray(tiny_image(16, 16))[..., 0]
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert (np.asarray(read_image(tmp_path / "deep.png", 16, 16)) == levels[..., None]).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(BadInputError, match="its pixels have 32 bits"):
        read_image(tmp_path / "deep.tif", 16, 16)


def test_a_file_of_questions_about_images_is_replaced_until_it_is_edited(tmp_path) -> None:
    prompts, output = prompt_file(tmp_path, "a", 0), tmp_path / "questions.json"
    for _ in range(2):
        questions_command(None, Path(prompts), "toy", ["critic.id=Qwen/Q", "prompts="], False, output)
    assert "true to its first frame" in output.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_knows_the_shapes(kind, tmp_path) -> None:
    from lowmem_drf.models.wan import images

    folder = save_tiny_i2v(tmp_path / "generator", kind)
    generator, family = generator_config(str(folder)), family_of(generator_config(str(folder)))
    encoder = images.encoder(str(folder), generator, family.load_vae(str(folder)))
    side = 32 if kind == "wan2.2-ti2v" else 16
    made = encoder.encode(tiny_image(side, side), 5)
    blank = images.blank(generator, (2, *made.latents_CFhw.shape[2:]), torch.float32)
    assert blank.latents_CFhw.shape == made.latents_CFhw.shape
    assert (blank.tokens_LD is None) == (made.tokens_LD is None)
    assert blank.tokens_LD is None or blank.tokens_LD.shape == made.tokens_LD.shape
