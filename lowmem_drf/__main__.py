"""``python -m lowmem_drf``: the console script without its folder on PATH."""

from lowmem_drf.cli import main

main()
