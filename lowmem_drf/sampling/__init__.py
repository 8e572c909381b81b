"""Noise levels that a configuration takes from its generator's publishers.

Not here: the publishers' tables (``models/*/sampling.toml``), the sampler (``method/schedule.py``), and torch.
"""
