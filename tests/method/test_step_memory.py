"""The relay's memory, as bytes saved by autograd: none in stages without gradient, otherwise one piece, for any K and
any number of frames."""

from dataclasses import replace

import pytest
import torch
from _relay import SavedBytes, saved_bytes
from _toys import CHANNELS, KEPT, SIDE, STEPS, TEMPORAL_FACTOR, batch_of, plan_of, toy_parts

from lowmem_drf.method.frames import backward_chunks
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.reward import RewardSpec, mean_reward
from lowmem_drf.method.step import decode, drf_step, vae_backward


@pytest.fixture
def parts():
    return toy_parts()


def peaks(step, parts, plan, batch):
    meter = SavedBytes()
    with meter.watch():
        step(replace(parts, stage=meter.stage), plan, *batch)
    assert meter.live == 0
    return meter.peak


def one_piece_each(parts, batch):
    """Saved bytes of the largest decode chunk, of one transformer pass and of the critic, each alone."""
    noise, cond, _, questions = batch
    x = noise.detach().requires_grad_()
    frames = parts.decoder.decode(x)[:, list(KEPT)].detach().requires_grad_()
    entering = decode(parts.decoder, x.detach(), KEPT)[1].caches

    def chunk(visit):
        z = x[:, :, visit.chunk : visit.chunk + 1].detach().requires_grad_()
        caches = tuple(cache if cache is None else cache.detach().requires_grad_() for cache in entering[visit.chunk])
        made, handed = parts.decoder.chunk(z, caches)
        return made[:, list(visit.local)], handed

    chunks = [saved_bytes(lambda visit=visit: chunk(visit)) for visit in backward_chunks(KEPT, TEMPORAL_FACTOR, None)]
    return {
        "vae_backward": max(chunks),
        "denoise_backward": saved_bytes(lambda: parts.velocity(x, 0.5, cond)),
        "critic": saved_bytes(lambda: mean_reward(parts.critic(frames, questions), questions, RewardSpec())[0]),
    }


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("chain", ["full", "drtune"])
def test_relay_holds_one_graded_step_or_one_chunk_and_naive_holds_all(parts, chain, guidance):
    batch = batch_of(1)
    alone = one_piece_each(parts, batch)
    naive = {}
    for k in (1, 2, 5, STEPS):
        plan = plan_of(range(STEPS - k, STEPS), chain=chain, guidance=guidance, guidance_grad="both")
        peak = peaks(drf_step, parts, plan, batch)
        assert peak["rollout"] == peak["decode"] == 0
        for stage, bytes_alone in alone.items():
            assert 0 < peak[stage] <= bytes_alone, stage
        naive[k] = max(peaks(naive_step, parts, plan, batch).values())
        assert naive[k] >= k * alone["denoise_backward"] * 0.9 > 0
    assert naive[1] < naive[2] < naive[5] < naive[STEPS]
    assert max(peak.values()) < naive[1]


def test_vae_backward_does_not_grow_with_the_frames(parts):
    peak = {}
    for latent_frames in (3, 6, 12):
        latents = torch.randn(1, CHANNELS, latent_frames, SIDE, SIDE, dtype=torch.float64)
        kept = range(1 + TEMPORAL_FACTOR * (latent_frames - 1))
        frames, entering = decode(parts.decoder, latents, kept)
        meter = SavedBytes()
        with meter.watch():
            vae_backward(parts.decoder, latents, entering, torch.randn_like(frames), kept)
        peak[latent_frames] = meter.peak["outside"]
    assert peak[3] == peak[6] == peak[12] > 0
