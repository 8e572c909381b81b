"""Wan's VAE (2.1 and 2.2): its decoder in chunks, segments and strips, with a backward of its own.

Not here: which frames and chunks are decoded (``method/vae_stream.py``), and other families' decoders.
"""
