"""Fake results that all plans of a test process share: most plans run the same operators on the same shapes. And the
settings of a small plan."""

from lowmem_drf.planner.plan import new_fakes

FAKES = new_fakes()
SMALL = (
    *("batch=1", "micro_batch=1", "sampler.steps=3", "sampler.graded_steps=2"),
    *("video.frames=5", "critic.frames=2"),
)
"""Overrides of preset ``toy`` for tests that ask nothing of the plan's size."""
