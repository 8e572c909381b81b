"""Several processes in one run: DeepSpeed's engines, ranks, and how the processes are started.

Not here: what a single card does with its memory (``memory/``). DeepSpeed is imported where it is used.
"""
