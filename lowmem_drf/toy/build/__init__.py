"""How ToyWorld's four models were trained: ``python -m lowmem_drf.toy.build`` (docs/toyworld.md).

Not here: anything that runs in a user's training.
"""
