"""How fast a LoRA learns: schedules of the learning rate, and the scale of rsLoRA."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model

from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.models.lora.adapter import lora_layers
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.prompts import as_prompts
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import run_config
from lowmem_drf.training.update import learning_rate


def test_learning_rate_schedules():
    optim = load_config("toy", ["optim.lr=1.0", "optim.warmup_steps=4", "optim.schedule=linear"]).optim
    assert [learning_rate(optim, step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = optim.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 6, 8) == pytest.approx(0.5)
    assert learning_rate(optim.model_copy(update={"schedule": "constant"}), 7, 8) == 1.0


@pytest.mark.parametrize(
    ("ours", "theirs", "more"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine_with_restarts", "cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", "polynomial", {"power": 2.0}),
    ],
)
def test_schedules_are_those_of_diffusers_behind_the_warm_up(ours, theirs, more):
    optim = load_config("toy", [f"optim.schedule={ours}", "optim.lr=1.0", "optim.warmup_steps=4"]).optim
    free = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (curve,) = get_scheduler(theirs, free, num_warmup_steps=4, num_training_steps=20, **more).lr_lambdas
    found = [learning_rate(optim, step, 20) for step in range(4, 20)]
    assert found == pytest.approx([curve(step) for step in range(4, 20)], abs=1e-6)  # its polynomial ends at 1e-7
    assert len(set(found)) > 5


def test_rslora_has_the_scale_of_pefts(tiny_preset, tmp_path):
    """And its files the alpha that says so to programs that do not know it."""
    settings = ["lora.rslora=true", "lora.rank=9", "lora.alpha=4", "log.sample_every=0", "batch=1", "micro_batch=1"]
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 1, None, False, settings, False)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(r=9, lora_alpha=4, use_rslora=True, target_modules=["0"])
    )
    scale = model.base_model.model[0].scaling["default"]
    pairs = read_lora(checkpoint_folder(run) / "lora.safetensors").pairs
    config = run_config(run)
    models = load_models(config, as_prompts(["a red circle"]), with_critic=False)
    load_run_lora(models.transformer, checkpoint_folder(run), config)
    layers = lora_layers(models.transformer).values()
    found = [*(pair.scale for pair in pairs.values()), *(layer.scaling["default"] for layer in layers)]
    assert scale == pytest.approx(4 / 3) and found == pytest.approx([scale] * 2 * len(pairs))
