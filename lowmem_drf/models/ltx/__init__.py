"""LTX-Video behind ``models.family.Family``: denoiser, VAE decoder, text encoder, published sizes. The 2B of 0.9.0 is
trained, and the 13B of 0.9.7, whose VAE decodes with a timestep and a little noise.

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
