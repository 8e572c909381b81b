"""The tiny decoder: TAEHV's architecture as a ``types.Decoder``, for gradients that cost a fraction of the VAE's."""

from __future__ import annotations
