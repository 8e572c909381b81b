"""How a generator's publishers sample it: what a configuration takes from them.

Not here: their tables (``models/*/sampling.toml``), the sampler (``method/schedule.py``), and torch.
"""
