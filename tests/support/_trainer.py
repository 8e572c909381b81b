"""A trainer that changes nothing, and keeps the gradients of each update; and a run of a tiny generator of any
family."""

from __future__ import annotations

import json

import torch
from _tiny import save_tiny_critic
from safetensors.torch import load_file

from lowmem_drf.commands.train import train_command
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.training.trainer import SingleTrainer

PROMPTS = [
    "a red circle moves left on a gray background",
    "a blue square moves up on a black background",
    "a green circle moves right on a white background",
]


class Keeping(SingleTrainer):
    def __init__(self, config, transformer):
        super().__init__(config, named_lora(transformer))
        self.gradients = []
        """Of every update so far: a tensor for each of the LoRA's, averaged and unclipped."""

    def step(self, lr):
        self.gradients.append([tensor.grad.clone() for tensor in self._lora])
        norm = torch.nn.utils.get_total_norm(self.gradients[-1]).item()
        for tensor in self._lora:
            tensor.grad = None
        return norm


def family_preset(folder, generator, targets, side, frames):
    """Writes a preset of two updates to ``folder``, with a tiny critic, and returns its path."""
    critic = save_tiny_critic(folder / "critic")
    (folder / "family.toml").write_text(f"""
prompts = "toyworld"
steps = 2
batch = 2
micro_batch = 1
dtype = "fp32"
device = "cpu"
[video]
width = {side}
height = {side}
frames = {frames}
[model]
id = "{generator.as_posix()}"
text_tokens = 12
[sampler]
steps = 3
graded_steps = 2
guidance = 2.0
[critic]
id = "{critic.as_posix()}"
questions = "grammar"
check = false
quant = "none"
frames = 3
[lora]
rank = 2
targets = {json.dumps([*targets])}
[memory]
vae_dtype = "fp32"
[log]
checkpoint_every = 1
sample_every = 0
eval_prompts = 0
watch_every = 0
""")
    return str(folder / "family.toml")


def lora_of_run(preset, folder, *settings):
    """The tensors of the LoRA after both updates."""
    train_command(preset, None, folder, None, None, False, list(settings), False)
    return load_file(folder / "checkpoints" / "step-000002" / "lora.safetensors")
