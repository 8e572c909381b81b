"""Predicts memory and time of a configuration by running the real update on fake tensors, advises what to change, and
measures real updates to compare (``measure``).

Not here: anything that saves memory in a run (``memory/``).
"""
