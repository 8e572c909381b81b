"""``DotsVae`` as a ``types.Decoder``: a chunk's backward recomputes the whole chunk; its trace is what entered it."""

import torch
from _toys import whole_chunk_backward

from lowmem_drf.models.clamp import InwardClamp

from .networks import SPATIAL, TEMPORAL


class DotsDecoder:
    temporal_factor, spatial_factor, causal, group = TEMPORAL, SPATIAL, True, 1

    def __init__(self, vae, *, grad_dtype=None, strips=1, caches="card", store=None, norm_silu=None):
        self.vae = vae

    def decode(self, latents_BCFhw):
        return InwardClamp.apply(self.vae.decode(latents_BCFhw.to(self.vae.dtype)), 0.0, 1.0)

    def start(self, batch):
        return (None, None)

    def chunk(self, latents_BC1hw, caches):
        z, (before, between) = latents_BC1hw.to(self.vae.dtype), caches
        x = torch.tanh(self.vae.first(torch.cat([torch.zeros_like(z) if before is None else before, z], dim=2)))
        y = self.vae.second(torch.cat([torch.zeros_like(x) if between is None else between, x], dim=2))
        frames = InwardClamp.apply(self.vae.pixels(y), 0.0, 1.0)
        return frames[:, :1] if before is None else frames, (z, x)

    def recorded_chunk(self, latents_BC1hw, caches):
        return *self.chunk(latents_BC1hw, caches), tuple(caches)

    def advance(self, latents_BC1hw, caches, keep):
        return self.chunk(latents_BC1hw, caches)[1], None if keep == "nothing" else tuple(caches)

    def store(self, caches):
        return caches

    def chunk_backward(self, *arguments):
        return whole_chunk_backward(self, *arguments)
