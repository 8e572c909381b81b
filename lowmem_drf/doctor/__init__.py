"""What ``lowmem-drf doctor`` looks at: this machine, its packages and its card, without a model and without a plan; and
what the card reaches (``card_rates``).

Not here: printing (``commands/doctor.py``), predictions (``planner/``), measurements of an update (``bench``).
"""
