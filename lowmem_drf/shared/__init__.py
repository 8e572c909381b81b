"""What commands share and no lower room can do alone: the tuned model to look at, what to do when memory runs out.

Not here: the commands themselves, and anything that a single lower room can do.
"""
