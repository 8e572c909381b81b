"""SmolVLM2 as a family of critics (``qwen_vl/families.py``): its frames, its vision tower and its words around a clip.

Not here: the critic itself, packed questions and loading, which all families share (``qwen_vl/``).
"""
