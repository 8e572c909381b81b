"""Dots: a family of generators as small as one can be, in the form that docs/adding-a-generator.md describes."""
