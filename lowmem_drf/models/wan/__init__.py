"""The Wan family (2.1 and 2.2) behind the method's interfaces: denoiser, VAE decoder, text encoder.

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
