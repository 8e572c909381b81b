"""CogVideoX behind ``models.family.Family``: denoiser, VAE decoder, text encoder, published sizes. Text-to-video of the
first version, 2B and 5B. They were trained by discrete diffusion with v-prediction (``sampling/levels.py``).

Not here: LoRA (``models/lora/``), and reading and packing of weights (``models/weights/``).
"""
