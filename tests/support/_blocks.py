"""A tiny Wan transformer with a LoRA, and its gradients under any activation settings."""

import torch
from _tiny import randomise_lora, tiny_condition, tiny_latents, tiny_transformer

from lowmem_drf.memory.host import HostStore
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, add_lora, lora_layers, lora_parameters
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.models.weights.quant import set_products
from lowmem_drf.planner.stand_ins import planned_store

STORE, PLANNED = HostStore(torch.device("cpu")), planned_store()


def make(dtype=torch.float64, layers=4, targets=DEFAULT_TARGETS):
    transformer = tiny_transformer(dtype, layers=layers)
    add_lora(transformer, rank=2, alpha=2.0, targets=targets)
    randomise_lora(transformer)
    return transformer


def in_integers(transformer):
    """Stores the layers below the LoRA in int8, with products of integers."""
    for layer in lora_layers(transformer).values():
        linear = layer.base_layer
        packed = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, "int8")
        packed.pack(linear.weight)
        packed.bias, layer.base_layer = linear.bias, packed
    set_products(transformer, True)
    return transformer


def gradients(transformer, settings, dtype=torch.float64, differentiable=True):
    """The velocity, and the gradients at the LoRA and at the latents for an upstream gradient drawn at random."""
    set_activations(transformer, Activations(store=STORE, **settings))
    x, text = tiny_latents(2, dtype=dtype).requires_grad_(differentiable), tiny_condition(2, dtype)
    v = as_velocity(transformer)(x, 0.5, text)
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    wanted = [*lora_parameters(transformer), *([x] if differentiable else [])]
    return [v.detach(), *torch.autograd.grad(v, wanted, upstream)]
