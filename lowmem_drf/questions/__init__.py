"""The critic's questions: from a prompt's text, from a language model, or from a user's file.

Not here: asking them (``models/qwen_vl/``), and the reward of an answer (``method/reward.py``).
"""
