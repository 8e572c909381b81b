"""The Wan transformer on the kernels: the velocity and every gradient of diffusers' arithmetic, within the rounding
that arithmetic has itself."""

from __future__ import annotations

import pytest
import torch
from _blocks import gradients, make
from _tiny import tiny_condition, tiny_latents
from _true_size import graded_step, wan_1_3b
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.wan.denoiser import set_activations
from lowmem_drf.ops import fused_ops, naive_ops


@pytest.fixture
def exact(monkeypatch):
    """(settings) -> velocity and gradients in fp64 of the model that ``as_loaded(dtype)`` makes, on the very same
    inputs."""
    to_fp32 = torch.Tensor.float

    def run(dtype, settings):
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
        model = make(torch.float64)
        with torch.no_grad():
            for wide, rounded in zip(model.parameters(), as_loaded(dtype).parameters(), strict=True):
                wide.copy_(rounded)
        x, text = tiny_latents(2, dtype=dtype).double(), tiny_condition(2, dtype).double()
        monkeypatch.setattr("_blocks.tiny_latents", lambda *_, **__: x)
        monkeypatch.setattr("_blocks.tiny_condition", lambda *_: text)
        result = gradients(model, settings)
        monkeypatch.undo()
        return result

    return run


def as_loaded(dtype):
    """Diffusers leaves the tables of the rotary embedding in fp32."""
    model = make(dtype)
    model.rope.to(torch.float32)
    return model


@pytest.mark.parametrize(
    "settings", [dict(), dict(slices=2, keep_attention="host"), dict(checkpoint="host", keep_attention="card")], ids=str
)
# Triton's interpreter cuts bf16 off where a card rounds
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_fused_rows_are_diffusers_arithmetic(dtype, settings, exact):
    truth = exact(dtype, settings)
    naive, fused = (
        gradients(as_loaded(dtype), settings | dict(rows=rows), dtype) for rows in (naive_ops(), fused_ops())
    )
    assert len(truth) > 40
    for name, part in (("velocity", slice(1)), ("gradients", slice(1, None))):
        ours, exactly, theirs = (
            torch.cat([tensor.double().flatten() for tensor in found[part]]) for found in (fused, truth, naive)
        )
        # element by element it is the operations that are held to their rounding (tests/kernels); through a whole model
        # roundings add up by chance
        budget = 2 * ((theirs - exactly).norm() + torch.finfo(dtype).eps * exactly.norm())
        assert (ours - exactly).norm() <= budget, name


def test_fused_rows_are_used():
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **kwargs or {})

    with Watch():
        gradients(make(torch.float32), dict(rows=fused_ops()), torch.float32)
    ours = {name for name in seen if name.startswith("lowmem_drf::")}
    assert ours == {
        f"lowmem_drf::{op}_{way}"
        for op in ("norm_modulate", "gate_residual", "rope_qk")
        for way in ("forward", "backward")
    }
    assert not [name for name in seen if "rms_norm" in name]


def test_the_recompute_of_a_block_takes_a_third_less_at_true_size():
    """Wan2.1-1.3B, 832x480, 81 frames, in the plan: what a block's recompute and backward take above what the blocks
    keep."""
    peaks = {}
    for rows in (naive_ops(), fused_ops()):
        with FakeTensorMode() as mode:
            model = wan_1_3b(mode, 2)
            set_activations(model, Activations(rows=rows))
            seen = graded_step(model)
        peaks[rows.name] = seen.peak - seen.kept
    assert peaks["fused"] <= 0.65 * peaks["naive"]
