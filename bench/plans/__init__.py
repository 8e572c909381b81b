"""Figures that come from plans, and those that check them on a card."""
