"""Adapters to the model libraries: the only modules that import diffusers, transformers, peft and bitsandbytes."""

import logging

# diffusers imports bitsandbytes, which on processors with AVX512-BF16 warns that it lacks the package of a kernel that
# is not used here
# (models/weights/quant.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
