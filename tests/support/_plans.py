"""Fake results that all plans of a test process share: most plans run the same operators on the same shapes."""

from lowmem_drf.planner.plan import new_fakes

FAKES = new_fakes()
