"""The Wan family (2.1 and 2.2) behind ``models.family.Family``: denoiser, VAE decoder, text encoder, names, published
sizes.

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
