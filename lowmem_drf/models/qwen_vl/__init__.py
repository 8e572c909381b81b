"""Qwen-VL critics (Qwen2.5-VL, Qwen3-VL) behind ``types.Critic``: packed questions, preprocessing, answers as logits.

Not here: the questions (``questions/``) and the reward of an answer (``method/reward.py``).
"""
