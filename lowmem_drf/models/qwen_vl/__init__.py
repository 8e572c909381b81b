"""Qwen-VL critics (Qwen2.5-VL, Qwen3-VL) behind ``types.Critic``: packed questions, preprocessing, answers as logits.

Not here: what is asked (``questions/``), and what an answer is worth (``method/reward.py``).
"""
