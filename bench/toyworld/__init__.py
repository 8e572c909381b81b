"""Measurements and pictures of ToyWorld."""
