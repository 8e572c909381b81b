"""Diffusion-DRF as pure functions of tensors. Models arrive as callables in ``types.Parts``.

Not here: any model library, configuration, logging or device choice.
"""
