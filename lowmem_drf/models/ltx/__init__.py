"""LTX-Video behind ``models.family.Family``: denoiser, VAE decoder, text encoder, published sizes. The 2B of 0.9.0 is
trained, whose VAE decodes without noise and without a timestep.

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
