"""LoRA: adapters on a transformer, fused linear layers, file formats, and optimizers.

Not here: writing a run's LoRA for other tools (``export/``).
"""
