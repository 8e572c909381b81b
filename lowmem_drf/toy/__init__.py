"""ToyWorld: a small world in which the truth can be computed (docs/toyworld.md).

Not here: ToyWorld's questions (``questions/toyworld.py``), and what needs models (``build/`` stands apart).
"""
