"""Measurements of the Triton kernels."""
