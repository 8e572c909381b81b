"""A trainer that changes nothing, and keeps the gradients of each update."""

from __future__ import annotations

import torch

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
