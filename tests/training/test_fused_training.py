"""ToyWorld on the interpreted kernels: the relay's gradients equal those of diffusers' arithmetic, and a run
completes. Small clips and one update: the interpreter takes seconds per pass."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from _relay import lora_gradients
from _tiny import randomise_lora

from lowmem_drf.assembly.assemble import step_spec
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.attention import attention_named
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.qwen_vl.critic import VLMCritic
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.wan.vae.decoder import WanDecoder
from lowmem_drf.ops import fused_ops, naive_ops, triton_attention
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.make import make_questions
from lowmem_drf.types import Parts

TEXT = "a red circle moves right on a gray background"
SMALL = (
    *("video.width=16", "video.height=16", "video.frames=5", "critic.frames=3", "critic.token_weights=uniform"),
    *("batch=1", "micro_batch=1", "sampler.steps=2", "sampler.graded_steps=1", "memory.checkpoint=true"),
    *("log.eval_prompts=0", "log.sample_every=0", "log.watch_every=0"),
)


def test_gradients_of_toyworld(monkeypatch):
    """All kernels at once: rows, attention and its kept results, the VAE's norms, LoRA layers. Their error against fp64
    is at most twice that of PyTorch's fp32."""
    config = load_config("toy", SMALL)
    models = load_models(config, as_prompts([TEXT]))
    plan, cond = step_spec(config, 0), models.condition(as_prompts([TEXT]))
    critic, questions = models.asked_critic, [make_questions(TEXT, "dense")]
    # not seed 3: its gradient is 20 times as large as those of 4 and 5, and amplifies roundings (docs/decisions.md)
    noise = draw_noise(models.latent_shape, [4])

    def gradient(dtype, rows, attention):
        transformer, vae = deepcopy(models.transformer).to(dtype), deepcopy(models.decoder.vae).to(dtype)
        add_lora(transformer, rank=4, alpha=4.0)
        randomise_lora(transformer)
        set_activations(transformer, Activations(rows=rows, attention=attention, keep_attention="card"))
        judge = VLMCritic(deepcopy(critic.model).to(dtype), critic.tokenizer, critic.geometry, critic.fps)
        for parameter in lora_parameters(transformer):
            parameter.data = parameter.data.to(dtype)
        decoder = WanDecoder(vae, norm_silu=rows.norm_silu)
        parts = Parts(as_velocity(transformer), decoder, judge, lora_parameters(transformer))
        return lora_gradients(drf_step, parts, plan, noise.to(dtype), cond.to(dtype), None, questions)[0].double()

    naive = gradient(torch.float32, naive_ops(), attention_named("sdpa"))
    fused = gradient(torch.float32, fused_ops(), triton_attention())
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    exact = gradient(torch.float64, naive_ops(), attention_named("sdpa"))
    budget = 2 * ((naive - exact).norm() + torch.finfo(torch.float32).eps * exact.norm())
    assert (fused - exact).norm() <= budget
    assert not torch.equal(fused, naive)


@pytest.mark.slow
def test_a_run_of_toyworld(tmp_path, capsys):
    run = tmp_path / "run"
    kernels = ["kernels.ops=fused", "kernels.attention=triton", "kernels.rollout_attention=int8"]
    train_command("toy", None, run, 1, None, False, [*SMALL, *kernels, "critic.mode=vanilla"], False)
    assert "kernels: fused; attention: triton (as asked); int8 attention" in capsys.readouterr().out
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["grad_norm"] > 0


def test_what_cannot_run_is_refused(monkeypatch):
    from lowmem_drf.errors import BadInputError

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for setting in ("ops=fused", *(f"attention={name}" for name in ("triton", "xformers", "flash"))):
        with pytest.raises(BadInputError, match=rf"kernels\.{setting.split('=')[0]} = .*cannot run: "):
            load_models(load_config("toy", [*SMALL, f"kernels.{setting}"]), as_prompts([TEXT]))
