"""The relay equals the one-graph oracle in fp64 for every combination of its options, and refuses impossible ones.

The toys here have no trivial derivative; ``test_step_models.py`` repeats it with the real model classes.
"""

from dataclasses import replace

import pytest
import torch
from _relay import LIMIT, lora_gradients, relative_difference
from _toys import (
    CHANNELS,
    KEPT,
    LATENT_FRAMES,
    SIDE,
    STEPS,
    TEMPORAL_FACTOR,
    ToyCritic,
    ToyDecoder,
    batch_of,
    plan_of,
    toy_parts,
)
from torch import nn

from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import StepSpec, decode, drf_step, rollout, vae_backward


@pytest.fixture
def parts():
    return toy_parts()


def assert_equal_steps(parts, plan, size=1, seed=None):
    def generators():
        return () if seed is None else [torch.Generator().manual_seed(seed + i) for i in range(size)]

    expected, expected_stats = lora_gradients(naive_step, parts, plan, *batch_of(size), generators())
    actual, stats = lora_gradients(drf_step, parts, plan, *batch_of(size), generators())
    assert relative_difference(actual, expected) < LIMIT
    assert relative_difference(stats.frames_BTCHW, expected_stats.frames_BTCHW) < LIMIT
    assert stats.reward == pytest.approx(expected_stats.reward)
    assert stats.reward_by_question == pytest.approx(expected_stats.reward_by_question)
    assert stats.reward_by_aspect.keys() == {"TA", "Phy", "VQ"}
    assert torch.equal(stats.latents_BCFhw, expected_stats.latents_BCFhw)


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"batch{size}")
@pytest.mark.parametrize(
    ("guidance", "grad"), [(1.0, "cond"), (3.0, "cond"), (3.0, "both")], ids=["unguided", "guided", "guided-both"]
)
@pytest.mark.parametrize("chain", ["full", "drtune"])
@pytest.mark.parametrize("k", [1, 2, 5, STEPS], ids=lambda k: f"K{k}")
def test_relay_is_naive(parts, k, chain, guidance, grad, size):
    plan = plan_of(range(STEPS - k, STEPS), chain=chain, guidance=guidance, guidance_grad=grad)
    assert_equal_steps(parts, plan, size)


@pytest.mark.parametrize("chain", ["full", "drtune"])
@pytest.mark.parametrize("grad", ["cond", "both"])
@pytest.mark.parametrize("graded", [(0,), (3,), (0, 2, 5), (1, 2, 4)], ids=str)
def test_relay_is_naive_for_any_set_of_graded_steps(parts, graded, grad, chain):
    assert_equal_steps(parts, plan_of(graded, chain=chain, guidance=2.0, guidance_grad=grad), size=2)


@pytest.mark.parametrize("chain", ["full", "drtune"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("graded", [(5,), (4, 5), range(STEPS), (0,), (1, 2, 4)], ids=str)
def test_relay_is_naive_where_each_step_draws_fresh_noise(parts, graded, guidance, chain):
    plan = plan_of(graded, update="renoise", guidance=guidance, guidance_grad="both", chain=chain)
    assert_equal_steps(parts, replace(plan, sigmas=flow_sigmas(STEPS, 3.0, (988, 783, 609, 406, 200, 90))), 2, seed=5)


@pytest.mark.parametrize("size", [1, 2], ids=lambda size: f"batch{size}")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("samples", [1, 3])
def test_relay_is_naive_for_draft_lv(parts, samples, guidance, size):
    assert_equal_steps(parts, plan_of((STEPS - 1,), lv_samples=samples, guidance=guidance), size, seed=7)


@pytest.mark.parametrize("huber", [None, 0.05], ids=["square", "huber"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("anchored", [(1,), (5,), (1, 4, 5)], ids=str)
def test_relay_is_naive_with_an_anchor(parts, anchored, guidance, huber):
    parts = replace(parts, base=toy_parts(seed=1).velocity)
    plan = plan_of((1, 4, 5), guidance=guidance, anchor=0.7, anchored=anchored, anchor_huber=huber)
    assert_equal_steps(parts, plan, size=2)


def test_an_anchor_pulls_towards_the_base_with_the_states_as_constants(parts):
    plan, batch = plan_of((3, 5)), batch_of(2)
    without, _ = lora_gradients(drf_step, parts, plan, *batch)
    anchored = replace(plan, anchor=2.0, anchored=(3,))
    still, stats = lora_gradients(drf_step, replace(parts, base=parts.velocity), anchored, *batch)
    assert stats.departure == 0 and torch.equal(still, without)
    base = toy_parts(seed=1).velocity
    pulled, stats = lora_gradients(drf_step, replace(parts, base=base), anchored, *batch)
    noise, cond, uncond, _ = batch
    x = rollout(parts.velocity, plan.sigmas, noise, cond, uncond, keep=(3,))[1][3]
    sigma = plan.sigmas[3].item()
    away = (parts.velocity(x, sigma, cond) - base(x, sigma, cond)).pow(2).mean()
    expected = torch.cat([one.flatten() for one in torch.autograd.grad(2 * away, parts.lora)])
    assert relative_difference(pulled - without, expected) < LIMIT
    assert stats.departure == pytest.approx(away.item())


@pytest.mark.parametrize("lv", [0, 2])
def test_relay_is_naive_where_the_frames_follow_the_motion(parts, lv):
    """Every DRaFT-LV copy is a separate clip with its own frames."""
    graded = (STEPS - 1,) if lv else (STEPS - 2, STEPS - 1)
    assert_equal_steps(parts, plan_of(graded=graded, lv_samples=lv, follow_motion=True), seed=3 if lv else None)


def test_draft_lv_is_the_mean_over_the_clip_and_its_copies(parts):
    plan = plan_of((STEPS - 1,), lv_samples=2)
    noise, cond, uncond, questions = batch_of(1)
    together, _ = lora_gradients(
        drf_step, parts, plan, noise, cond, uncond, questions, [torch.Generator().manual_seed(3)]
    )
    alone, _ = lora_gradients(drf_step, parts, replace(plan, lv_samples=0), noise, cond, uncond, questions)
    x_0, _ = rollout(parts.velocity, plan.sigmas, noise, cond, uncond)
    last, generator = plan.sigmas[-2:], torch.Generator().manual_seed(3)
    for _ in range(2):
        noised = (1 - last[0]) * x_0 + last[0] * torch.randn(x_0.shape[1:], generator=generator).double()
        gradient, _ = lora_gradients(drf_step, parts, StepSpec(last, (0,), KEPT), noised, cond, uncond, questions)
        alone = alone + gradient
    assert relative_difference(together, alone / 3) < LIMIT


def test_step_adds_to_gradients(parts):
    plan, batch = plan_of((3, 5)), batch_of(1)
    once, _ = lora_gradients(drf_step, parts, plan, *batch)
    drf_step(parts, plan, *batch)
    drf_step(parts, plan, *batch)
    assert relative_difference(torch.cat([p.grad.flatten() for p in parts.lora]), 2 * once) < LIMIT


def test_shares_of_a_batch_add_up_to_it(parts):
    plan, (noise, cond, uncond, questions) = plan_of((3, 5), guidance=2.0), batch_of(2)
    together, _ = lora_gradients(drf_step, parts, plan, noise, cond, uncond, questions)
    for step in (drf_step, naive_step):
        alone = [
            lora_gradients(step, parts, plan, *(part[i : i + 1] for part in (noise, cond, uncond, questions)), (), 0.5)[
                0
            ]
            for i in (0, 1)
        ]
        assert relative_difference(alone[0] + alone[1], together) < LIMIT


def test_gradient_raises_the_reward(parts):
    plan, batch = plan_of(range(STEPS)), batch_of(2)
    before = drf_step(parts, plan, *batch).reward
    with torch.no_grad():
        for parameter in parts.lora:
            parameter -= 1e-2 * parameter.grad
    assert drf_step(parts, plan, *batch).reward > before


def test_batch_of_two_is_the_mean_of_two_batches_of_one(parts):
    plan = plan_of((2, 4, 5), guidance=2.0)
    noise, cond, uncond, questions = batch_of(2)
    together, stats = lora_gradients(drf_step, parts, plan, noise, cond, uncond, questions)
    ones = [
        lora_gradients(drf_step, parts, plan, noise[i : i + 1], cond[i : i + 1], uncond[i : i + 1], questions[:1])
        for i in (0, 1)
    ]
    assert relative_difference(together, (ones[0][0] + ones[1][0]) / 2) < LIMIT
    assert stats.reward == pytest.approx((ones[0][1].reward + ones[1][1].reward) / 2)


@pytest.mark.parametrize("window", [LATENT_FRAMES - 1, LATENT_FRAMES, 100])
def test_a_window_over_all_chunks_is_exact(parts, window):
    plan = plan_of((4, 5))
    exact, _ = lora_gradients(drf_step, parts, plan, *batch_of(1))
    assert (
        relative_difference(lora_gradients(drf_step, parts, replace(plan, vae_window=window), *batch_of(1))[0], exact)
        < LIMIT
    )


@pytest.mark.parametrize("window", [0, 1])
def test_a_window_cuts_the_gradient_of_the_caches_where_it_says(parts, window):
    """Against one graph whose caches are detached by hand."""
    plan = replace(plan_of((4, 5)), kept=(4,), vae_window=window)
    batch = batch_of(1)
    critic = ToyCritic().double()
    critic.look = nn.Linear(3 * SIDE * SIDE, 8).double().requires_grad_(False)
    parts = replace(parts, critic=critic)
    actual, _ = lora_gradients(drf_step, parts, plan, *batch)
    last_chunk = LATENT_FRAMES - 1

    class Cut:
        temporal_factor, causal = TEMPORAL_FACTOR, True

        def decode(self, latents_BCFhw):
            caches, frames = parts.decoder.start(len(latents_BCFhw)), []
            for chunk, z in enumerate(latents_BCFhw.split(1, dim=2)):
                if chunk == last_chunk - window:
                    caches = tuple(cache.detach() for cache in caches)
                made, caches = parts.decoder.chunk(z, caches)
                frames.append(made)
            return torch.cat(frames, dim=1)

    expected, _ = lora_gradients(naive_step, replace(parts, decoder=Cut()), replace(plan, vae_window=None), *batch)
    exact, _ = lora_gradients(naive_step, parts, replace(plan, vae_window=None), *batch)
    assert relative_difference(actual, expected) < LIMIT
    assert relative_difference(actual, exact) > LIMIT


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("every", [2, 3, 9])
def test_caches_that_are_computed_again_change_nothing(parts, every, window):
    plan, batch = plan_of((4, 5), vae_window=window), batch_of(2)
    expected, _ = lora_gradients(drf_step, parts, plan, *batch)
    for changes in ({"vae_cache_every": every}, {"record_decode": 9}, {"record_decode": 1, "vae_cache_every": every}):
        assert torch.equal(lora_gradients(drf_step, parts, replace(plan, **changes), *batch)[0], expected)


def test_caches_are_stored_for_every_so_many_chunks_and_let_go(parts):
    latents = torch.randn(1, CHANNELS, 9, SIDE, SIDE, dtype=torch.float64)
    kept = (4, 16)  # chunks 2 and 8, and in a window of 3 those below
    frames, left = decode(parts.decoder, latents, kept, 3, 2)
    assert sorted(left.caches) == [0, 2, 6, 8]  # of 0 1 2 5 6 7 8
    vae_backward(parts.decoder, latents, left, torch.randn_like(frames), kept, 3)
    assert not left.caches and not left.traces


def test_chunks_after_the_last_kept_frame_are_never_decoded(parts):
    seen = []

    class Counting(ToyDecoder):
        def chunk(self, latents_BC1hw, caches):
            seen.append(torch.is_grad_enabled())
            return super().chunk(latents_BC1hw, caches)

    decoder = Counting().double()
    latents = batch_of(1)[0]
    frames, left = decode(decoder, latents, kept=(1, 2))
    assert seen == [False, False]
    assert sorted(left.caches) == [0, 1]
    assert relative_difference(frames, decoder.decode(latents)[:, 1:3]) < LIMIT


@pytest.mark.parametrize("reward", ["yes_logprob", "yes_margin"])
def test_a_satisfied_hinge_gives_zero_gradient(parts, reward):
    plan = plan_of((4, 5), reward=RewardSpec(reward, hinge=-1e3))
    gradient, stats = lora_gradients(drf_step, parts, plan, *batch_of(1))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert stats.reward == -1e3


class Broken(ToyCritic):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, frames_BTCHW, questions):
        answers = super().forward(frames_BTCHW, questions)
        answers[0][0] = replace(answers[0][0], logits_AV=self.value(answers[0][0].logits_AV))
        return answers


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda logits: logits * float("nan"), "reward is nan.*color"),
        (lambda logits: (logits * 0).sqrt() + logits, "frames the critic saw"),
    ],
    ids=["reward", "frames"],
)
def test_a_non_finite_critic_is_refused_before_any_lora_gradient(parts, value, what):
    with pytest.raises(NonFiniteError, match=what):
        drf_step(replace(parts, critic=Broken(value).double()), plan_of((5,)), *batch_of(1))
    assert all(parameter.grad is None for parameter in parts.lora)


def test_a_non_finite_decoder_gradient_is_refused_before_any_lora_gradient(parts):
    class Kinked(ToyDecoder):
        def chunk(self, latents_BC1hw, caches):
            return super().chunk(latents_BC1hw + (latents_BC1hw * 0).sqrt(), caches)

    with pytest.raises(NonFiniteError, match="behind the VAE"):
        drf_step(replace(parts, decoder=Kinked().double()), plan_of((5,)), *batch_of(1))
    assert all(parameter.grad is None for parameter in parts.lora)


def test_a_non_finite_gradient_between_graded_steps_names_the_step(parts):
    def kinked(x, sigma, cond):
        return parts.velocity(x + (x * 0).sqrt(), sigma, cond)

    with pytest.raises(NonFiniteError, match="enter step 5"):
        drf_step(replace(parts, velocity=kinked), plan_of((4, 5)), *batch_of(1))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"graded": ()}, "graded steps"),
        ({"anchor": 1.0}, "anchor"),
        ({"anchor_huber": 0.0}, "anchor_huber"),
        ({"anchor": 1.0, "anchored": (0,)}, "anchor"),
        ({"graded": (5, 4)}, "ascending"),
        ({"graded": (STEPS,)}, "in 0..5"),
        ({"kept": ()}, "kept frames"),
        ({"kept": (2, 2)}, "kept frames"),
        ({"chain": "half"}, "chain"),
        ({"guidance_grad": "none"}, "guidance gradient"),
        ({"vae_window": -1}, "window"),
        ({"vae_cache_every": 0}, "vae_cache_every"),
        ({"lv_samples": 1, "graded": (4, 5)}, "lv_samples"),
        ({"lv_samples": -1}, "lv_samples"),
    ],
    ids=str,
)
def test_an_impossible_plan_is_refused(changes, what):
    with pytest.raises(BadInputError, match=what):
        replace(plan_of((STEPS - 1,)), **changes)


@pytest.mark.parametrize("step", [drf_step, naive_step])
@pytest.mark.parametrize("changes", [{"lv_samples": 1}, {"update": "renoise"}], ids=str)
def test_fresh_noise_without_its_generators_is_refused(parts, step, changes):
    with pytest.raises(ValueError, match="generators, one per clip: 1, not 0"):
        step(parts, plan_of((STEPS - 1,), **changes), *batch_of(1))


def test_naive_has_no_window(parts):
    with pytest.raises(ValueError, match="vae_window"):
        naive_step(parts, plan_of((5,), vae_window=1), *batch_of(1))


def test_a_decoder_without_caches_needs_no_earlier_chunk(parts):
    class PerFrame(ToyDecoder):
        def start(self, batch):
            return ()

        def chunk(self, latents_BC1hw, caches):
            empty = (torch.zeros_like(latents_BC1hw), latents_BC1hw.new_zeros(len(latents_BC1hw), 4, 1, SIDE, SIDE))
            return super().chunk(latents_BC1hw, empty)[0], ()

        def decode(self, latents_BCFhw):
            return torch.cat([self.chunk(z, ())[0] for z in latents_BCFhw.split(1, dim=2)], dim=1)[
                :, TEMPORAL_FACTOR - 1 :
            ]

    decoder = PerFrame().double()
    latents = batch_of(1)[0].requires_grad_()
    upstream = torch.randn(1, 2, 3, SIDE, SIDE, dtype=torch.float64)
    (expected,) = torch.autograd.grad(decoder.decode(latents)[:, 3:5], latents, upstream)
    frames, left = decode(decoder, latents.detach(), (3, 4))
    assert relative_difference(vae_backward(decoder, latents.detach(), left, upstream, (3, 4)), expected) < LIMIT
