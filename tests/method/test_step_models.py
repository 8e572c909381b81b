"""The relay equals the one-graph oracle with the real classes in fp64: tiny, random Wan transformer with LoRA, Wan VAE
and Qwen2.5-VL."""

from dataclasses import replace

import pytest
import torch
from _blocks import in_integers
from _relay import LIMIT, QUESTIONS, STEPS, SavedBytes, lora_gradients, plan_of, relative_difference
from _tiny import Z_DIM, tae_weights, tiny_condition, tiny_parts

from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.tiny.decoder import TinyBackward, TinyDecoder
from lowmem_drf.models.tiny.network import Sizes, TinyNetwork


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture(autouse=True)
def fp64_throughout(monkeypatch):
    """Diffusers computes Wan's norms and modulations in fp32 (``x.float()``), even in an fp64 model. That rounding
    would hide small differences, or amplify them to 1e-7."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))


def batch_of(size):
    noise = draw_noise((Z_DIM, 3, 4, 4), range(size)).double()
    return noise, tiny_condition(size, seed=0), tiny_condition(size, seed=1), [QUESTIONS, QUESTIONS[::-1]][:size]


def assert_equal_steps(parts, plan, size, seed=None, batch=None):
    def generators():
        return () if seed is None else [torch.Generator().manual_seed(seed + i) for i in range(size)]

    batch = batch or batch_of(size)
    expected, expected_stats = lora_gradients(naive_step, parts, plan, *batch, generators())
    actual, stats = lora_gradients(drf_step, parts, plan, *batch, generators())
    assert relative_difference(actual, expected) < LIMIT
    assert relative_difference(stats.frames_BTCHW, expected_stats.frames_BTCHW) < LIMIT
    assert stats.reward == pytest.approx(expected_stats.reward)


@pytest.mark.parametrize(
    ("guidance", "grad"), [(1.0, "cond"), (4.7, "cond"), (4.7, "both")], ids=["unguided", "guided", "guided-both"]
)
@pytest.mark.parametrize("chain", ["full", "drtune"])
@pytest.mark.parametrize("k", [2, STEPS], ids=lambda k: f"K{k}")
def test_relay_is_naive(parts, k, chain, guidance, grad):
    """Two clips; single ones below."""
    graded = range(STEPS - k, STEPS)
    assert_equal_steps(parts, plan_of(graded, chain=chain, guidance=guidance, guidance_grad=grad), size=2)


def test_relay_is_naive_with_the_tiny_decoder(parts):
    """And beside another decoder it only says how near its gradient is."""
    sizes = Sizes(Z_DIM, (6, 5, 4, 3))
    network = TinyNetwork(sizes, temporal_factor=4, spatial_factor=4)
    weights = {name.partition(".")[2]: value for name, value in tae_weights(sizes).items() if name[0] == "d"}
    network.load(weights)
    tiny = replace(parts, decoder=TinyDecoder(network.double()))
    assert_equal_steps(tiny, plan_of((4, 5)), size=2)
    alone, stats = lora_gradients(drf_step, parts, plan_of((5,)), *batch_of(2))
    beside, compared = lora_gradients(drf_step, replace(parts, compared=tiny.decoder), plan_of((5,)), *batch_of(2))
    assert torch.equal(beside, alone) and stats.compared is None and abs(compared.compared.cosine) < 0.99
    _, itself = lora_gradients(drf_step, replace(parts, compared=parts.decoder), plan_of((5,)), *batch_of(2))
    assert itself.compared.cosine == pytest.approx(1)
    same = replace(parts, compared=TinyBackward(parts.decoder, tiny.decoder))
    for every in (1, 2):  # of frames that are known there is no second decode
        plan = replace(plan_of((5,)), vae_cache_every=every)
        twice, once = (
            lora_gradients(drf_step, replace(same, same_frames=known), plan, *batch_of(2))[1].compared
            for known in (False, True)
        )
        assert once == twice and abs(once.cosine) < 0.99


@pytest.mark.parametrize("chain", ["full", "drtune"])
@pytest.mark.parametrize(
    ("generator", "expert", "graded"),
    [
        ("wan2.1-14b", "low", (1, 4, 5)),
        ("wan2.2-5b", "low", (3, 4, 5)),
        ("wan2.2-a14b", "low", (2, 3, 5)),
        ("wan2.2-a14b", "low", (5,)),
        ("wan2.2-a14b", "high", (0, 1)),
        ("wan2.2-a14b", "high", (1,)),
    ],
    ids=str,
)
def test_relay_is_naive_for_every_generator(generator, expert, graded, chain):
    """The high-noise expert denoises steps 0 and 1. The gradient passes the other expert's steps unchanged."""
    parts = tiny_parts(generator=generator, expert=expert)
    channels = len(parts.decoder.vae.config.latents_mean)
    noise, condition = draw_noise((channels, 3, 4, 2), [0]).double(), tiny_condition(1, seed=0)
    assert_equal_steps(
        parts,
        plan_of(graded, chain=chain, guidance=4.7, guidance_grad="both"),
        1,
        batch=(noise, condition, tiny_condition(1, seed=1), [QUESTIONS]),
    )


def test_relay_is_naive_with_products_of_integers():
    """Which round to 8 bits, forward and backward: both take the same function, and its same gradient."""
    parts = tiny_parts()
    closure = [cell.cell_contents for cell in parts.velocity.__closure__]
    in_integers(next(one for one in closure if isinstance(one, torch.nn.Module)))
    assert_equal_steps(parts, plan_of((1, 4, 5), guidance=4.7, guidance_grad="both"), size=2)


def test_the_frozen_expert_never_runs_with_gradient():
    parts = tiny_parts(generator="wan2.2-a14b")
    for step in (drf_step, naive_step):
        with pytest.raises(ValueError, match="not that of the trained expert"):
            lora_gradients(step, parts, plan_of((1, 2)), *batch_of(1))


@pytest.mark.parametrize("kept", [(0,), (6,), (2, 4), (8,)], ids=str)
def test_relay_is_naive_for_any_kept_frames(parts, kept):
    assert_equal_steps(parts, plan_of((1, 4), kept=kept, reward=RewardSpec("yes_margin")), size=1)


@pytest.mark.parametrize("guidance", [1.0, 4.7])
def test_relay_is_naive_for_draft_lv(parts, guidance):
    assert_equal_steps(parts, plan_of((STEPS - 1,), lv_samples=2, guidance=guidance), size=2, seed=7)


@pytest.mark.parametrize("chain", ["full", "drtune"])
def test_memory_of_the_relay_does_not_depend_on_k_and_that_of_naive_does(parts, chain):
    peak = {}
    for step in (drf_step, naive_step):
        for k in (2, 5):
            meter = SavedBytes()
            with meter.watch():
                lora_gradients(
                    step, replace(parts, stage=meter.stage), plan_of(range(STEPS - k, STEPS), chain=chain), *batch_of(1)
                )
            assert meter.live == 0
            peak[step, k] = meter.peak
    assert peak[drf_step, 2] == peak[drf_step, 5]
    assert peak[drf_step, 5]["rollout"] == peak[drf_step, 5]["decode"] == 0
    grown = peak[naive_step, 5]["outside"] - peak[naive_step, 2]["outside"]
    assert grown >= 3 * 0.9 * peak[drf_step, 5]["denoise_backward"] > 0
