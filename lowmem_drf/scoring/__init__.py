"""Judges clips: base against tuned, the critic's verdict on any video, and where its gradient points.

Not here: the reward of training (``method/reward.py``), and the commands that print these results (``commands/``).
"""
