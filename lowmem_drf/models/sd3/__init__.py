"""Stable Diffusion 3 and 3.5 behind ``models.family.Family``: denoiser, VAE decoder, text encoders, published sizes. An
image is a clip of one frame.

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
