"""Does a better reward make a better clip, what drifts meanwhile, and what stops the drift: ToyWorld's long study."""
