"""What ``lowmem-drf doctor`` looks at: this machine, its packages and its card, without a model and without a plan.

Not here: printing (``commands/doctor.py``), predictions (``planner/``), measurements of an update (``bench``).
"""
