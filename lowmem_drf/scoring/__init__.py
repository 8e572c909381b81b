"""Judges clips: base against tuned, the critic's scores of any video, and saliency maps of its gradient.

Not here: the training reward (``method/reward.py``), and the commands that print these results (``commands/``).
"""
