"""Diffusion-DRF as pure functions: the step and its one-graph oracle, sampler, frames, preprocess, reward.

Not here: models, which arrive as callables in ``types.Parts``, and the questions (``questions/``).
"""
