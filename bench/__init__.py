"""Measurements and pictures of the README: run from the checkout as ``python -m bench.<name>``. Not part of the
installed package."""
