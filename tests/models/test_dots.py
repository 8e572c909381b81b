"""docs/adding-a-generator.md, followed to the letter: a family in one folder and one line trains, plans and exports."""

import pytest
import torch
from _plans import FAKES
from _relay import LIMIT, QUESTIONS, STEPS, lora_gradients, plan_of, relative_difference
from _tiny import randomise_lora, tiny_critic
from _trainer import family_preset, lora_of_run
from dots import family as dots
from dots.networks import DotsText, DotsTransformer, DotsVae
from safetensors.torch import save_file

from lowmem_drf.commands.bench import count_bytes
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.config import load_config
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.method.vae_stream import decode
from lowmem_drf.models.generators import FAMILIES
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.lora.report import make_report
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.types import Parts

TARGETS = ("q", "k", "v", "o", "up", "down")


@pytest.fixture(autouse=True)
def registered():
    """The one line."""
    FAMILIES.append(dots)
    yield
    FAMILIES.remove(dots)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A generator of the family in diffusers' layout."""
    folder = tmp_path_factory.mktemp("dots")
    torch.manual_seed(0)
    DotsTransformer().save_pretrained(folder / "transformer")
    DotsVae().save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    save_file(DotsText().state_dict(), folder / "text_encoder" / "model.safetensors")
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "dots", "width": 8, "num_layers": 1}')
    (folder / "tokenizer").mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def preset(folder, tmp_path):
    return family_preset(tmp_path, folder, TARGETS, side=16, frames=9)


@pytest.fixture(scope="module")
def parts(folder):
    transformer = dots.load_transformer(str(folder), torch.float64)
    add_lora(transformer, rank=2, alpha=2.0, targets=TARGETS)
    randomise_lora(transformer)
    decoder = dots.decoder(dots.load_vae(str(folder), torch.float64))
    return Parts(dots.as_velocity(transformer), decoder, tiny_critic(torch.float64), lora_parameters(transformer))


@pytest.mark.parametrize("k", [1, 3, STEPS], ids=lambda k: f"K{k}")
def test_relay_is_naive_for_the_new_family(parts, k):
    noise = draw_noise((4, 3, 4, 4), range(2)).double()
    cond, uncond = (draw_noise((1, 1, 6, 8), seeds)[:, 0, 0].double() for seeds in ([1, 2], [3, 3]))
    plan = plan_of(range(STEPS - k, STEPS), guidance=2.0, guidance_grad="both")
    expected, _ = lora_gradients(naive_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    actual, _ = lora_gradients(drf_step, parts, plan, noise, cond, uncond, [QUESTIONS] * 2)
    assert relative_difference(actual, expected) < LIMIT


def test_its_chunks_are_its_librarys_decode(parts):
    latents = draw_noise((4, 5, 4, 4), [0, 1]).double()
    frames, _ = decode(parts.decoder, latents, range(17))
    assert relative_difference(frames, parts.decoder.vae.decode(latents).clamp(0, 1)) < 1e-14


def test_it_trains_and_what_saves_memory_changes_nothing(preset, tmp_path):
    plain = lora_of_run(preset, tmp_path / "plain")
    stream = ("memory.checkpoint=true", "memory.stream=['transformer']", "memory.park=['critic','vae']")
    saving = lora_of_run(preset, tmp_path / "saving", *stream, "memory.record_rollout=true")
    assert plain.keys() == saving.keys() and all(torch.equal(plain[name], saving[name]) for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_B" in name)
    made = export_run(tmp_path / "plain", form="diffusers")
    assert "diffusers (pipe.load_lora_weights)" in str(made) and "Verified" in str(made)
    lora = read_lora(made.paths[0])
    assert lora.pairs.keys() == {f"dots_blocks.{i}.{name}" for i in range(2) for name in TARGETS}
    assert make_report(made.paths[0], lora).layers[0].blocks == (0, 1)


def test_its_plan_is_what_an_update_takes(preset):
    config = load_config(preset, ["batch=1", "video.width=64", "video.height=64", "video.frames=21"])
    plan, counted = make_plan(config, card_named("rtx4090"), fakes=FAKES), count_bytes(config)
    assert {name: plan.stages[name].peak_gib for name in counted} == pytest.approx(counted, rel=0.05)
    assert plan.stages.keys() - counted.keys() == {"text"}
