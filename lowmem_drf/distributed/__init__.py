"""Runs of several processes: launcher, ranks and DeepSpeed's engines.

A single card's memory is ``memory/``'s. DeepSpeed is imported where it is used.
"""
