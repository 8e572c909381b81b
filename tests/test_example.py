"""The examples. ``drf_in_100_lines.py``: the one-graph method gives the LoRA gradient of the relay, on models that the
package loads by itself. ``python_api.py`` runs."""

import importlib.util
from pathlib import Path

import pytest
import torch
from _relay import LIMIT, lora_gradients, relative_difference
from _tiny import lift_norms, randomise_lora

from lowmem_drf.method.frames import kept_frames
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, add_lora, load_lora_state, lora_parameters, lora_state
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.questions.toyworld import attributes, dense
from lowmem_drf.types import Parts

EXAMPLE, API = (Path(__file__).parent.parent / "examples" / name for name in ("drf_in_100_lines.py", "python_api.py"))
PROMPTS = ["a red circle moves left on a gray background", "a blue square stays still on a white background"]
FP64 = torch.float64


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example():
    return imported(EXAMPLE)


@pytest.fixture
def fp64_throughout(monkeypatch):
    """diffusers and transformers cast to fp32 inside fp64 models (``x.float()``): rounding that would hide small
    differences."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == FP64 else to_fp32(x))


def relay_parts(lora, rank, alpha):
    """The package's own loading and adapters, and the LoRA of the example."""
    generator, critic = resolve("toyworld", "generator"), load_critic(resolve("toyworld", "critic"), FP64)
    transformer = load_denoiser(generator).double()  # all of it: from_pretrained would keep norms in fp32
    add_lora(transformer, rank, alpha, DEFAULT_TARGETS)
    load_lora_state(transformer, lora)
    lift_norms(critic.model)
    return Parts(as_velocity(transformer), WanDecoder(load_vae(generator, FP64)), critic, lora_parameters(transformer))


def test_its_gradient_is_the_relays(example, fp64_throughout):
    models, noise = example.Models(), draw_noise((16, 3, 8, 8), [0, 1]).double()
    for model in (models.transformer, models.vae, models.text_encoder, models.critic):
        model.double()
    lift_norms(models.critic)
    randomise_lora(models.transformer, std=0.02)  # with B = 0 the gradient at A would be zero
    reward = example.mean_reward(models, noise, PROMPTS)
    (-reward).backward()
    expected = torch.cat([weight.grad.flatten() for weight in models.lora])

    parts = relay_parts(lora_state(models.transformer), rank=16, alpha=16.0)
    spec = RewardSpec(weights=example.SHARES)
    plan = StepSpec(
        flow_sigmas(example.N, 3.0), tuple(range(example.N - example.K, example.N)), kept_frames(9, 9), reward=spec
    )
    text = load_text(resolve("toyworld", "generator"), FP64).encode(PROMPTS, 16)
    actual, stats = lora_gradients(
        drf_step, parts, plan, noise, text, None, [dense(attributes(prompt)) for prompt in PROMPTS]
    )

    assert stats.reward == pytest.approx(reward.item(), rel=LIMIT)
    assert relative_difference(actual, expected) < LIMIT


def test_it_stays_short_and_apart_from_the_relay():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 120
    assert max(map(len, source.splitlines())) <= 120
    assert "method.step" not in source


@pytest.mark.slow
def test_the_python_api_does_what_its_example_shows(tmp_path, capsys):
    imported(API).main(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("rtx4090: ") and said[-1] == str(tmp_path / "lora.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "both.mp4", "tuned.mp4", "lora.safetensors"}
    assert sum(line.startswith("update ") for line in said) >= 4
