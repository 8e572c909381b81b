"""Predicts memory and time of a configuration by running the real update on fake tensors, and advises what to change.

Not here: anything that saves memory in a run (``memory/``), and the measurement on a real card (``commands/bench.py``).
"""
