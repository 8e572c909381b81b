"""Configuration -> loaded models as ``types.Parts``, with their texts and questions; generation without gradients.

Not here: training (``training/``) and the model classes (``models/``).
"""
