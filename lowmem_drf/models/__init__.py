"""Adapters to the model libraries: the only modules that import diffusers, transformers and peft."""
