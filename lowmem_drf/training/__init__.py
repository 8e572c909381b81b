"""The training loop: updates, optimizer steps, checkpoints, the run folder, metrics and progress.

Not here: the gradient itself (``method/step.py``), and the plan made before a run (``planner/``).
"""
