"""Weights parked on the host: bytes, values, what stays on the card, and errors for calls without them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from _relay import LIMIT, lora_gradients, relative_difference
from _tiny import (
    Z_DIM,
    randomise_lora,
    save_tiny_critic,
    tiny_condition,
    tiny_critic,
    tiny_latents,
    tiny_transformer,
    tiny_vae,
)
from _true_size import wan_1_3b
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.errors import LowmemError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.residency import NEEDS, Parked, Residency
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.wan.vae.decoder import WanDecoder
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.types import Parts, Question

CPU = torch.device("cpu")


def tuned_transformer(dtype=torch.float64):
    transformer = tiny_transformer(dtype, layers=3)
    add_lora(transformer, rank=2, alpha=2.0)
    randomise_lora(transformer)
    return transformer


def storages_of(module):
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


def sizes_of(module):
    """Bytes of the frozen tensors and of the trainable ones, each storage once."""
    trainable = {p.untyped_storage()._cdata: p.nbytes for p in module.parameters() if p.requires_grad}
    every = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in storages_of(module)}
    return sum(every.values()) - sum(trainable.values()), sum(trainable.values())


def check_bytes(module):
    """Parks, wakes, parks, wakes under a ledger."""
    frozen, trainable = sizes_of(module)
    with Ledger() as ledger:
        ledger.adopt(storages_of(module))
        assert ledger.card_bytes == frozen + trainable and frozen > 100
        parked = Parked("it", module, CPU, planned_store())
        assert parked.nbytes == frozen and not parked.awake
        for _ in range(2):
            assert (ledger.card_bytes, ledger.host_bytes) == (trainable, frozen)
            parked.wake()
            assert parked.awake and (ledger.card_bytes, ledger.host_bytes) == (frozen + trainable, frozen)
            parked.park()
        assert ledger.peak_host_bytes == frozen
    return parked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_transformer_parked_and_woken_is_the_same(dtype):
    transformer = tuned_transformer(dtype)
    x, text = tiny_latents(1, dtype=dtype), tiny_condition(1, dtype)

    def gradients():
        v = as_velocity(transformer)(x, 0.5, text)
        return [v.detach(), *torch.autograd.grad(v, lora_parameters(transformer), torch.ones_like(v))]

    wanted, identities = gradients(), [id(p) for p in transformer.parameters()]
    kept = {
        name: (tensor.dtype, tensor.device, tensor.requires_grad) for name, tensor in transformer.named_parameters()
    }
    lora = [p.data_ptr() for p in lora_parameters(transformer)]
    parked = check_bytes(transformer)
    assert {
        name: (tensor.dtype, tensor.device, tensor.requires_grad) for name, tensor in transformer.named_parameters()
    } == kept
    assert [p.data_ptr() for p in lora_parameters(transformer)] == lora
    parked.wake()
    assert [id(p) for p in transformer.parameters()] == identities
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))


def test_a_vae_parked_and_woken_is_the_same():
    vae = tiny_vae()
    decoder, latents = WanDecoder(vae), tiny_latents(1, dtype=torch.float32)
    with torch.no_grad():
        wanted = decoder.decode(latents)
        parked = check_bytes(vae)
        with pytest.raises(LowmemError, match="it was called while its weights wait on the host"):
            decoder.decode(latents)
        parked.wake()
        assert torch.equal(decoder.decode(latents), wanted)


def test_a_4_bit_critic_parked_and_woken_is_the_same(tmp_path):
    critic = load_critic(str(save_tiny_critic(tmp_path, width=96)), torch.float32, quant="nf4")
    assert any(isinstance(module, PackedLinear) for module in critic.model.modules())
    frames = torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    asked = [[Question("TA", "is the circle red ?", "yes")]]

    def gradient():
        logits = critic(frames, asked)[0][0].logits_AV
        return logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[0, 3], frames)[0]

    values = [tensor.clone() for tensor in storages_of(critic.model)]
    parked = check_bytes(critic.model)
    parked.wake()
    assert len(values) > 100 and all(torch.equal(a, b) for a, b in zip(storages_of(critic.model), values, strict=True))
    # from these copies: the file's tensors have other addresses, which change the order of the CPU's sums
    wanted = gradient()
    parked.park()
    assert not any(tensor.numel() for tensor in (*critic.model.parameters(), *critic.model.buffers()))
    with pytest.raises(LowmemError, match="it was called while its weights wait on the host"):
        gradient()
    parked.wake()
    got = gradient()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]) and wanted[1].any()


def test_tied_weights_stay_tied():
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    module = nn.ModuleList([embedding, head]).requires_grad_(False)
    head.weight = nn.Parameter(embedding.weight.data, requires_grad=False)  # two parameters, one storage
    parked = check_bytes(module)
    parked.wake()
    assert head.weight.data_ptr() == embedding.weight.data_ptr() and parked.nbytes == 160


def test_a_lora_can_be_put_on_while_the_weights_are_away():
    """As in a run: models are loaded and parked first."""
    transformer, wanted = tiny_transformer(layers=3), tuned_transformer(torch.float32)
    parked = Parked("transformer", transformer, CPU, HostStore(CPU))
    add_lora(transformer, rank=2, alpha=2.0)
    randomise_lora(transformer)
    with pytest.raises(LowmemError, match="transformer was called while its weights wait on the host"):
        as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))
    parked.wake()
    for ours, theirs in zip(transformer.state_dict().values(), wanted.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_bytes_at_true_size():
    with FakeTensorMode() as mode:
        model = wan_1_3b(mode)
        frozen, trainable = sizes_of(model)
        with Ledger() as ledger:
            ledger.adopt(storages_of(model))
            parked = Parked("transformer", model, CPU, planned_store())
            assert (ledger.card_bytes, ledger.host_bytes) == (trainable, frozen) and frozen > 200 * 1024**2
            parked.wake()
            assert ledger.card_bytes == frozen + trainable


class Recorder:
    """A meter that notes which models are awake when it is entered, and within."""

    def __init__(self):
        self.models, self.seen = {}, []

    @contextmanager
    def stage(self, name):
        self.seen.append((name, self.awake()))
        yield

    def awake(self):
        return {name for name, module in self.models.items() if all(p.numel() for p in module.parameters())}


def test_a_stage_has_what_it_needs_and_its_meter_begins_without_the_rest():
    meter = Recorder()
    meter.models = {name: nn.Linear(2, 2).requires_grad_(False) for name in ("transformer", "vae", "critic")}
    residency = Residency(meter.models, ["critic", "transformer"], CPU, HostStore(CPU), meter.stage)
    assert meter.awake() == {"vae"}  # which is not to be parked
    for name in ("rollout", "decode", "critic", "vae_backward", "denoise_backward", "update", "rollout"):
        with residency.stage(name):
            assert meter.awake() == NEEDS[name] & meter.models.keys() | {"vae"}
    outside = [awake for _, awake in meter.seen]
    assert outside == [{"vae"}, {"vae"}, {"vae"}, {"vae"}, {"vae"}, {"vae"}, {"vae"}]
    with residency.stage("denoise_backward"):  # the same model again: nothing moves
        assert meter.seen[-1][1] == {"transformer", "vae"}
    residency.need("critic", "transformer")
    assert meter.awake() == {"transformer", "vae", "critic"}
    residency.need("critic", "vae")
    assert meter.awake() == {"vae", "critic"}


def test_nothing_parked_moves_nothing():
    module = nn.Linear(2, 2).requires_grad_(False)
    residency = Residency({"critic": module}, [], CPU, HostStore(CPU), lambda name: nullcontext())
    with residency.stage("rollout"):
        assert module.weight.numel() == 4 and not module._forward_pre_hooks
    with pytest.raises(ValueError, match="not among the modules"):
        Residency({"vae": module}, ["critic"], CPU, HostStore(CPU), lambda name: nullcontext())


@pytest.mark.parametrize("under_a_ledger", [False, True], ids=["plain", "ledger"])
@pytest.mark.parametrize("slices", [1, 5])
def test_a_relay_step_with_every_switch_on_equals_the_plain_one(slices, under_a_ledger, monkeypatch):
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    transformer, vae, critic = tuned_transformer(), tiny_vae(torch.float64), tiny_critic(torch.float64)
    plain = Parts(as_velocity(transformer), WanDecoder(vae), critic, lora_parameters(transformer))
    plan = StepSpec(flow_sigmas(4, 3.0), (2, 3), kept=(0, 3, 8), guidance=3.0, guidance_grad="both")
    asked = [
        [
            Question("TA", "is the circle red ?", "yes", name="color"),
            Question("Phy", "does it jump ?", "no", name="jump"),
        ]
    ]
    inputs = (
        draw_noise((Z_DIM, 3, 4, 4), range(1)).double(),
        tiny_condition(1, seed=0),
        tiny_condition(1, seed=1),
        asked,
    )
    set_activations(transformer, Activations(checkpoint=False))
    wanted, _ = lora_gradients(drf_step, plain, plan, *inputs)

    store = planned_store() if under_a_ledger else HostStore(CPU)
    with Ledger() if under_a_ledger else nullcontext():
        set_activations(transformer, Activations("host", slices=slices, store=store))
        modules = {"transformer": transformer, "vae": vae, "critic": critic.model}
        residency = Residency(modules, list(modules), CPU, store, lambda name: nullcontext())
        got, _ = lora_gradients(drf_step, replace(plain, stage=residency.stage), plan, *inputs)
    assert torch.equal(got, wanted) if slices == 1 else relative_difference(got, wanted) < LIMIT
