"""Scalar rewards besides the critic's answers: CLIP and PickScore by frames and prompt, and modules of the user's.

Not here: the sum of all rewards (``method/reward.py``), and the critics (``qwen_vl/``).
"""
