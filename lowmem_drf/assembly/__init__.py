"""From a configuration to loaded models put together as ``types.Parts``, their texts and questions; clips without
gradient.

Not here: training (``training/``), and the model classes themselves (``models/``).
"""
