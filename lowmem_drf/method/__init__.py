"""Diffusion-DRF as pure functions. Models arrive as callables in ``types.Parts``; no model library is imported here."""
