"""Gives every command bad input, and checks each refusal: exit code 2, at most 6 lines, no traceback, the cure, and
no new file.

    python -m bench.bad_inputs

Needs no network and no card. Exit code 1 if a row is not as it should be.
"""
