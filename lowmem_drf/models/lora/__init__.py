"""LoRA: adapters on a transformer, fused linear layers, file formats, and the optimizers of its weights.

Not here: writing a run's LoRA for other tools (``export/``).
"""
