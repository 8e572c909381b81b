"""Measurements of the critic."""
