"""Runs of several processes: launcher, ranks and DeepSpeed's engines.

Not here: the memory of a single card (``memory/``). DeepSpeed is imported where it is used.
"""
