"""The commands, one file each: what ``cli.py`` and ``api.py`` call, and nobody else.

Not here: anything that two commands share (``shared/``).
"""
