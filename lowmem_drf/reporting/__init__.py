"""The report of a run: one HTML file that needs no network, made of what the run's folder holds.

Not here: what is measured while a run trains (``training/``), and base against tuned by the critic (``scoring/``).
"""
