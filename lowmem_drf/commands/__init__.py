"""The commands, one file each: what ``cli.py`` calls, and nobody else.

Not here: anything that two commands share.
"""
