"""What the critic is asked: questions from a prompt's text, from a language model, or from a user's file.

Not here: asking them (``models/qwen_vl/``), and what an answer is worth (``method/reward.py``).
"""
