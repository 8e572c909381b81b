"""How ToyWorld's four models were trained: ``python -m lowmem_drf.toy.build`` (docs/toyworld.md). Nothing here runs in
a user's training."""
