"""ToyWorld: a small world in which the truth can be computed (docs/toyworld.md)."""
