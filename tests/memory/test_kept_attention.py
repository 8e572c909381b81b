"""Fused attention checkpointing and recorded rollouts: no self-attention runs twice, gradients are the same to the bit,
and bytes are known."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from _blocks import PLANNED, STORE, gradients, make
from _relay import QUESTIONS, lora_gradients, plan_of
from _tiny import Z_DIM, tiny_condition, tiny_latents, tiny_parts
from _true_size import HIDDEN, TOKENS, graded_step, wan_1_3b
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_drf.memory.recorded_rollout import Recorder
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import lora_parameters
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.planner.ledger import Ledger

LAYERS = 4
LSE = TOKENS * 12 * 4
"""Bytes of one self-attention's log-sum-exps at true size."""


class Attentions(TorchDispatchMode):
    """Counts attentions, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.forward += 1
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            self.backward += 1
        return func(*args, **kwargs or {})


@cache
def recomputed(checkpoint, slices):
    """(gradients, attentions) where no attention is kept."""
    with Attentions() as seen:
        return gradients(make(layers=LAYERS), dict(checkpoint=checkpoint, slices=slices)), seen


@pytest.mark.parametrize("slices", [1, 2, 4])  # of 12 tokens
@pytest.mark.parametrize("checkpoint", [True, "host"])
@pytest.mark.parametrize("where", ["card", "host"])
def test_kept_attentions_change_no_bit_and_run_once(where, checkpoint, slices):
    wanted, plain = recomputed(checkpoint, slices)
    with Attentions() as kept:
        got = gradients(make(layers=LAYERS), dict(checkpoint=checkpoint, slices=slices, keep_attention=where))
    assert len(got) > 40 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    of_a_forward = 1 + slices  # among the tokens, and to the text slice by slice
    assert kept.forward == LAYERS * (1 + 2 * slices)
    assert plain.forward == 2 * LAYERS * of_a_forward
    assert kept.backward == plain.backward == LAYERS * of_a_forward


def test_without_gradient_nothing_is_kept():
    transformer = make()
    set_activations(transformer, Activations(store=PLANNED, keep_attention="host"))
    with Ledger() as ledger, torch.no_grad():
        as_velocity(transformer)(tiny_latents(1), 0.5, tiny_condition(1))
        assert ledger.host_bytes == 0


def test_a_graph_serves_one_backward():
    transformer = make()
    set_activations(transformer, Activations(store=STORE, keep_attention="card"))
    v = as_velocity(transformer)(tiny_latents(1), 0.5, tiny_condition(1))
    lora = lora_parameters(transformer)
    torch.autograd.grad(v, lora, torch.ones_like(v), retain_graph=True)
    with pytest.raises(RuntimeError, match="kept for one backward"):
        torch.autograd.grad(v, lora, torch.ones_like(v))


@pytest.fixture
def relay(monkeypatch):
    """(settings, plan) -> the LoRA gradients of a relay step on the tiny models, and the number of attentions in each
    stage."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    parts = tiny_parts()
    transformer = next(
        cell.cell_contents for cell in parts.velocity.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)
    )
    batch = (
        draw_noise((Z_DIM, 3, 4, 4), range(2)).double(),
        tiny_condition(2, seed=0),
        tiny_condition(2, seed=1),
        [QUESTIONS, QUESTIONS[::-1]],
    )

    def run(plan, record, attentions=True, store=STORE, **settings):
        recorder = Recorder(store, attentions) if record else None
        set_activations(
            transformer,
            Activations(store=store, keep_attention="host" if attentions else "none", recorder=recorder, **settings),
        )
        counts = Counter()

        def velocity(*arguments):
            with Attentions() as seen:
                out = as_velocity(transformer, recorder)(*arguments)
            counts["graded" if torch.is_grad_enabled() else "rollout"] += seen.forward
            return out

        used = replace(parts, velocity=velocity, base=lambda *given: 0.9 * as_velocity(transformer)(*given))
        if record:
            used = replace(used, recorder=recorder)
        generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
        gradient, stats = lora_gradients(drf_step, used, plan, *batch, generators if plan.lv_samples else ())
        return gradient, stats, counts

    return run


@pytest.mark.parametrize(
    ("changes", "slices"),
    [
        (dict(), 1),
        (dict(), 3),
        (dict(chain="drtune"), 3),
        (dict(guidance=3.0), 3),
        (dict(guidance=3.0, guidance_grad="both"), 1),
        (dict(guidance=3.0, guidance_grad="both"), 3),
        (dict(graded=(1, 3)), 3),
        (dict(graded=(5,), lv_samples=2), 3),
        (dict(guidance=3.0, anchor=0.5, anchored=(3, 4)), 3),
    ],
    ids=str,
)
def test_a_recorded_rollout_gives_the_same_gradients(relay, changes, slices):
    """Of attentions and inputs; in slices, of inputs alone too."""
    plan = plan_of(**({"graded": (3, 4, 5)} | changes))
    wanted, wanted_stats, plain = relay(plan, False, slices=slices)
    passes = len(plan.graded) * (2 if changes.get("guidance_grad") == "both" else 1)
    passes += len(set(plan.anchored) - {plan.graded[0]})  # at the first one the anchor joins the step's backward
    of_a_forward = 2 * (1 + slices)  # two blocks
    copies = plan.lv_samples
    assert plain["graded"] == (passes + copies) * of_a_forward
    for attentions in (True, False) if slices > 1 else (True,):
        got, stats, recorded = relay(plan, True, attentions, slices=slices)
        assert torch.equal(got, wanted) and torch.equal(stats.frames_BTCHW, wanted_stats.frames_BTCHW)
        assert recorded["graded"] == copies * of_a_forward  # DRaFT-LV's copies come after the rollout: not recorded
        assert recorded["rollout"] == plain["rollout"]


@pytest.mark.parametrize("attentions", [True, False], ids=["attentions", "inputs-alone"])
def test_what_is_recorded_is_exact_whatever_the_rollout_is(relay, attentions):
    """Another attention without gradient changes the clip; the gradient of the graded steps at its latents stays
    exact."""
    calls = []

    def rough(q, k, v):
        calls.append(torch.is_grad_enabled())
        return torch.nn.functional.scaled_dot_product_attention(
            *((0.9 * x).transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)

    plan = plan_of((3, 4, 5), guidance=3.0)
    exact, _, _ = relay(plan, True, attentions)
    got, _, _ = relay(plan, True, attentions, rollout_attention=rough)
    steps, blocks = 6, 2
    # every pass of every block, but for the conditional passes of the recorded steps
    assert calls == [False] * (blocks * (2 * steps - 3))
    assert not torch.equal(got, exact)


def test_records_are_used_up(relay):
    with Ledger() as ledger:
        relay(plan_of((3, 4, 5), guidance=3.0), True, store=PLANNED)
        gc.collect()
        assert ledger.peak_host_bytes > 0 == ledger.host_bytes


@pytest.fixture(scope="module")
def true_size():
    """Settings -> ``Bytes`` of a graded step of two blocks."""

    def run(**settings):
        with FakeTensorMode() as mode:
            model = wan_1_3b(mode, 2)
            set_activations(model, Activations(store=PLANNED, **settings))
            return graded_step(model)

    return run


def test_bytes_and_operations_at_true_size(true_size):
    plain, card, host = true_size(), true_size(keep_attention="card"), true_size(keep_attention="host")
    results = 2 * (HIDDEN + LSE)  # of two blocks
    assert card.kept - plain.kept == results and card.waiting == 0
    assert host.waiting == results and host.kept == plain.kept
    # the price on the card, where they wait on the host: those of one block at work, and of the next one on its way
    assert host.peak - plain.peak < 0.3 * 1024**3
    spared = 2 * 4 * TOKENS * TOKENS * 1536
    assert plain.flops - card.flops == plain.flops - host.flops == spared


def test_bytes_and_operations_of_a_record_at_true_size():
    """A rollout's pass and the graded step that uses it: one forward in all, then the backward."""
    with FakeTensorMode() as mode:
        model = wan_1_3b(mode, 2)
        recorder = Recorder(PLANNED, attentions=True)
        set_activations(model, Activations(store=PLANNED, keep_attention="host", recorder=recorder))
        velocity = as_velocity(model, recorder)
        with Ledger() as ledger:
            ledger.adopt([*model.parameters(), *model.buffers()])
            x, text = torch.empty(1, 16, 21, 60, 104, requires_grad=True), torch.empty(1, 512, 4096)
            with torch.no_grad(), recorder.record(0, [text]):
                velocity(x, 0.5, text)
            rollout, waiting = ledger.flops, ledger.host_bytes
            with recorder.replay(0, text):
                out = velocity(x, 0.5, text)
            forward = ledger.flops - rollout
            out.backward(torch.empty_like(out), inputs=[*lora_parameters(model), x])
            backward = ledger.flops - rollout - forward
    # inputs of the blocks, what leaves the last one, the self-attentions
    assert waiting == 3 * HIDDEN + 2 * (HIDDEN + LSE)
    assert forward < 0.01 * rollout  # embeddings and the head
    attention = 4 * TOKENS * (TOKENS + 512) * 1536
    linears = rollout / 2 - attention  # of one block, and half of what is outside
    # two blocks: the attention's backward, five products for two; the frozen linears once forward, once back, their
    # LoRA a little more
    assert backward == pytest.approx(2 * (2.5 * attention + 2 * linears), rel=0.05)


def test_settings_that_keep_what_nobody_takes_are_refused():
    from lowmem_drf.config import load_config
    from lowmem_drf.errors import BadInputError

    for settings in (
        ("memory.checkpoint=false", "memory.keep_attention=card"),
        ("memory.checkpoint=false", "memory.record_rollout=true"),
    ):
        with pytest.raises(BadInputError, match="checkpoint = true"):
            load_config("toy", settings)
