"""Weights before and while they are loaded: sources, downloads, safetensors files, and packing to 8 or 4 bit.

Not here: moving them between card and host in a run (``memory/``).
"""
