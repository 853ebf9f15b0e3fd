"""A job kind that does nothing, for measuring what the queue itself costs; no product code knows it."""
