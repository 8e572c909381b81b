"""The Wan family (2.1 and 2.2) behind the seams of the method: denoiser, VAE decoder, text encoder.

Not here: LoRA (``models/lora/``), and how weights are read and packed (``models/weights/``).
"""
