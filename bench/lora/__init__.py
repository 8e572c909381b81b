"""LoRA files in every layout of the wild, the change that each makes by the rule of the tool that writes it, and what
our doors and diffusers make of it: ``python -m bench.lora.table``."""
