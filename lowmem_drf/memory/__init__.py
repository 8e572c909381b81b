"""Saves memory in a run: host store, parking, weight streaming, activation policies, kept attentions, recorded
rollouts.

Not here: predicting it. Nothing in this room knows of plans (``planner/``).
"""
