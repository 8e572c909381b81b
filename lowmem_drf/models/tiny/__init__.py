"""The tiny decoder: TAEHV's architecture as a ``types.Decoder``, for gradients that cost a fraction of the VAE's.

Not here: the comparison with the VAE's gradient (``method/step.py``), and how ToyWorld's was trained (``toy/build/``).
"""
