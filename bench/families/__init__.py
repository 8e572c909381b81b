"""What is measured of every family of generators, on a tiny one of its real classes with random weights."""
