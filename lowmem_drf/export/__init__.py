"""Writes a trained LoRA, or a model with it merged in, for other tools, and verifies it by reading it back.

Not here: the key formats of LoRA files (``models/lora/``).
"""
