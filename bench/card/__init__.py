"""``python -m bench.card``: what the first ten minutes on a card should settle."""
