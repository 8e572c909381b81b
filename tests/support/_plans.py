"""Fake results that all plans of a test process share: most plans run the same operators on the same shapes. The
settings of a small plan, and what a ledger counts of a clip's chunks."""

import torch

from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.plan import new_fakes
from lowmem_drf.planner.shortcuts import _ShortcutDecoder

FAKES = new_fakes()
SMALL = (
    *("batch=1", "micro_batch=1", "sampler.steps=3", "sampler.graded_steps=2"),
    *("video.frames=5", "critic.frames=2"),
)
"""Overrides of preset ``toy`` for tests that ask nothing of the plan's size."""


def peaks_of_chunks(decoder, latents, short, every=1, record=0):
    """Bytes of card and host: the peaks of decode and backward, and what the decode leaves. ``short``: chunks that
    repeat are left out, as in a plan."""
    clip, frames = decoder, decoder.temporal_factor * (latents.shape[2] - 1) + 1
    with Ledger() as ledger:
        if short:
            clip = _ShortcutDecoder(decoder, ledger, [])
        kept = range(0, frames, decoder.temporal_factor)
        made, left = decode(clip, latents, kept, cache_every=every, record=record)
        decoded = ledger.peak_card_bytes, ledger.peak_host_bytes, ledger.host_bytes
        ledger.reset_peak()
        vae_backward(clip, latents, left, torch.ones_like(made), kept, found=lambda error: None)
        return *decoded, ledger.peak_card_bytes, ledger.peak_host_bytes, ledger.host_bytes
